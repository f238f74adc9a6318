# Functions of the scripts in this folder, which name what they test in `test`.

fail() {
    echo "$test: $*" >&2
    failed
    exit 1
}

# What a script shows of a failure, if it defines this function again.
failed() {
    :
}

passed() {
    echo "$test: $*"
}

# Waits up to a number of seconds for a command to succeed.
within() {
    seconds=$1
    shift
    tries=0
    until "$@"; do
        tries=$((tries + 1))
        [ "$tries" -le "$seconds" ] || return 1
        sleep 1
    done
}

get() {
    python3 -c 'import sys, urllib.request; sys.stdout.write(urllib.request.urlopen("http://127.0.0.1:9836" + sys.argv[1], timeout=10).read().decode())' "$1"
}

kernel_mode() {
    get /metrics | sed -n 's/^gpu_sampler_kernel_mode{mode="\([a-z_]*\)"} 1$/\1/p'
}

# Whether the GPU time of a container grows, with this name and an image in the family of all labels.
is_attributed() {
    get '/metrics?collect[]=all' >metrics.txt 2>/dev/null || return 1
    python3 - "$1" "$2" <<'PYTHON'
import re, sys
identifier, name = sys.argv[1:]
page = open("metrics.txt").read()
seconds = re.findall(r'container_gpu_seconds_total\{[^}]*container_id="%s"[^}]*\} ([0-9.]+)' % identifier, page)
info = re.findall(r'container_gpu_info\{([^}]*container_id="%s"[^}]*)\}' % identifier, page)
labelled = any('name="%s"' % name in labels and 'image=""' not in labels for labels in info)
sys.exit(not (labelled and any(float(value) > 0 for value in seconds)))
PYTHON
}

# An image without a registry for an engine, docker or podman.
import_image() {
    tar --create --directory / bin/busybox | "$@" import - busybox:1 >/dev/null 2>&1
}

# Whether the kernel is at least MAJOR.MINOR.
kernel_is() {
    printf '%s\n%s\n' "$1" "$(uname -r)" | sort --version-sort --check=quiet
}

# waits_of SESSION: seconds waited, seconds with probes, and the first problem, of all users together, in fields.
waits_of() {
    gpu-sampler report --format json "$1" >waits.json || return 1
    python3 - <<'PYTHON'
import json
waits = [user["waits"] for user in json.load(open("waits.json"))["users"] if user.get("waits")]
problems = [problem for wait in waits for problem in wait["problems"]]
waited, probed = (sum(wait[key] for wait in waits) for key in ("wait_seconds", "probed_seconds"))
problem = " ".join(problems[0].split()) if problems else "" if waits else "no process has probes"
print(f"{waited:.2f}", f"{probed:.2f}", problem, sep="\t")
PYTHON
}

# Whether these fields are those of a process that waits for its own work, a part of the time.
counts_waiting() {
    awk -F '\t' '{ exit !($2 > 5 && $1 > 0.05 * $2 && $1 < 0.9 * $2) }' "$1"
}

waiting_in_words() {
    awk -F '\t' '{ printf "waited %s of %s s", $1, $2 }' "$1"
}
