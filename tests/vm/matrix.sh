#!/bin/sh
# In a machine with systemd as its first process: what `cargo xtask matrix` records of one kernel and one layout of cgroups. Each line of
# `$RESULTS/cells.tsv` is a check, its result (ok, failed, or absent if the machine lacks what it needs), and a detail.
#
#     cargo build --package verifier-log
#     cargo xtask vm 6.1 --with tests/vm/lib.sh --with tests/vm/matrix.sh --with tests/vm/refuse-raw-tracepoints.py \
#         --with target/debug/libverifier_log.so -- sh matrix.sh
set -eu
test=matrix
. ./lib.sh

cells=$RESULTS/cells.tsv
sim=/root/sim
mode=raw_tracepoint
case $(cat /sys/kernel/security/lockdown 2>/dev/null || true) in
*"[confidentiality]"*) mode=inotify ;;
esac

cell() {
    printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$cells"
    passed "$1: $2: $3"
}

# Starts the agent by a command of its own, or as it is; waits until it serves.
start_agent() {
    agent_log=$RESULTS/agent-$1.txt
    shift
    "$@" gpu-sampler run --nvml-lib "$sim/lib/libnvidia-ml.so.1" --gpu-budget-percent 100 --gpu-wait-percent 100 >"$agent_log" 2>&1 &
    agent=$!
    within 60 get /readyz >/dev/null 2>&1
}

stop_agent() {
    kill "$agent" 2>/dev/null || true
    wait "$agent" 2>/dev/null || true
}

# load GPU PID: the process uses the GPU until the end.
load() {
    nvml-sim load --dir "$sim" --gpu "$1" --demand 0.2 --pid "$2" >/dev/null 2>&1 &
}

# engine CELL COMMAND ..: two containers of an engine, one before the agent's start and one after it.
before=
engine() {
    name=$1
    shift
    if id=$("$@" run --detach --name "$name-before" --network none busybox:1 /bin/busybox sleep 3600 2>>"$RESULTS/engines.txt"); then
        load 0 "$("$@" inspect --format '{{.State.Pid}}' "$name-before")"
        before="$before $name:$id"
    else
        cell "$name" absent "$(tail -n 1 "$RESULTS/engines.txt" | cut -c 1-120)"
    fi
}

# What manages the engine's cgroups: systemd, or cgroupfs, the engine itself.
driver() {
    case $1 in
    docker) docker info --format '{{.CgroupDriver}}' ;;
    podman-rootless) rootless podman info --format '{{.Host.CgroupManager}}' ;;
    *) podman info --format '{{.Host.CgroupManager}}' ;;
    esac 2>>"$RESULTS/engines.txt" || echo unknown
}

# Whether the container from before the agent's start has GPU time and labels, and one that starts now.
engine_is_attributed() {
    name=$1 id=$2
    shift 2
    pid=$("$@" inspect --format '{{.State.Pid}}' "$name-before")
    # Rootless engines make none on version 1. On version 2, and of a container that has ended, that is a failure like any other.
    if [ $layout != v2 ] && [ -e "/proc/$pid/cgroup" ] && ! grep -q "$id" "/proc/$pid/cgroup"; then
        cell "$name" absent "the engine makes no cgroup for the container: $(grep -m 1 -e '^0::' -e pids "/proc/$pid/cgroup" | cut -c 1-80)"
        return
    fi
    if ! within 60 is_attributed "$id" "$name-before"; then
        cell "$name" failed "a container from before the agent's start has no GPU time or labels"
        return
    fi
    new=$("$@" run --detach --name "$name-after" --network none busybox:1 /bin/busybox sleep 3600 2>>"$RESULTS/engines.txt")
    load 1 "$("$@" inspect --format '{{.State.Pid}}' "$name-after")"
    driver=$(driver "$name")
    if ! within 60 is_attributed "$new" "$name-after"; then
        cell "$name" failed "a container from after the agent's start has no GPU time or labels"
    elif [ "$name, $layout" = "docker, v2" ] && [ "$driver" != systemd ]; then
        cell "$name" failed "its cgroup driver is $driver instead of systemd"
    else
        cell "$name" ok "$("$@" version --format '{{.Client.Version}}' 2>/dev/null || "$@" --version), cgroups by $driver"
    fi
}

# The user of rootless engines, with a session manager of its own.
rootless() {
    runuser -u rootless -- env XDG_RUNTIME_DIR=/run/user/"$(id -u rootless)" HOME="$(getent passwd rootless | cut -d : -f 6)" sh -c 'cd && exec "$@"' sh "$@"
}

# What the wait probes of a process outside containers count, which waits for its own work.
waits() {
    log=$RESULTS/agent-waits.txt expected=refused keep=
    if kernel_is 6.6; then
        expected=uprobe_multi
    elif kernel_is 5.15; then
        expected="perf events" keep=GPU_SAMPLER_KEEP_CAPABILITY=sys_admin
    fi
    # Also reads the verifier's log of each program, which delays the probes by seconds on an emulated processor.
    set -- env "LD_PRELOAD=$PWD/libverifier_log.so" "VERIFIER_LOG=$RESULTS/verifier.tsv" RUST_LOG=info,gpu_sampler::observe=debug
    if ! start_agent waits "$@" $keep; then
        cell "wait probes" failed "$(tail -n 1 "$log" | cut -c 1-160)"
        stop_agent
        return
    fi
    cuda-work run --dir "$sim" --gpu 1 --kernel 4ms --every 20ms --for 60m >/dev/null 2>"$RESULTS/cuda-work.txt" &
    worker=$!
    # Until the driver lists the process, and the agent has read that.
    sleep 10
    gpu-sampler record --wait-probes=pid=$worker --duration 45s --output waits.gpus >"$RESULTS/record.txt" 2>&1 || true
    kill "$worker" 2>>"$RESULTS/cuda-work.txt" || true
    stop_agent
    if ! waits_of waits.gpus >waits.txt 2>>"$RESULTS/record.txt"; then
        cell "wait probes" failed "$(cat "$RESULTS/cuda-work.txt" "$RESULTS/record.txt" | tail -n 1 | cut -c 1-160)"
        return
    fi
    probes=uprobe_multi
    ! grep -q 'wait probes use perf events' "$log" || probes="perf events"
    problem=$(cut -f 3 waits.txt)
    case $expected:$problem in
    refused:*"they require Linux 5.15"*) cell "wait probes" absent "$(echo "$problem" | cut -c 1-160)" ;;
    "$probes":) cell "wait probes" "$(counts_waiting waits.txt && echo ok || echo failed)" "$probes, $(waiting_in_words waits.txt)" ;;
    *) cell "wait probes" failed "$(echo "$probes, $(waiting_in_words waits.txt): $problem" | cut -c 1-160)" ;;
    esac
}

nvml-sim init --dir "$sim" --gpus 2 >/dev/null
systemctl start docker.service
import_image docker
import_image podman
engine docker docker
engine podman podman
engine podman-runc podman --runtime runc
useradd --create-home --shell /bin/sh --add-subids-for-system rootless 2>/dev/null || useradd --create-home --shell /bin/sh rootless
grep -q '^rootless:' /etc/subuid || usermod --add-subuids 200000-265535 --add-subgids 200000-265535 rootless
chmod 755 /root
chmod -R a+rwX "$sim"
if loginctl enable-linger rootless && within 20 test -d "/run/user/$(id -u rootless)"; then
    tar --create --directory / bin/busybox >/tmp/busybox.tar
    rootless podman import - busybox:1 </tmp/busybox.tar >/dev/null 2>&1 || true
    engine podman-rootless rootless podman
else
    cell podman-rootless absent "no session manager of a user"
fi
# A pod of a cluster, as the kubelet has it with systemd cgroups. Docker refuses a slice where systemd does not manage its cgroups.
pod=8bb25662_de9a_11e9_84e7_f8f21e04010c
if id=$(docker run --detach --name kubelet-pod --network none --cgroup-parent "kubepods-burstable-pod$pod.slice" \
    --label io.kubernetes.pod.namespace=serving --label io.kubernetes.pod.name=llm-0 --label io.kubernetes.container.name=server \
    --label "io.kubernetes.pod.uid=$(echo $pod | tr _ -)" --label io.kubernetes.docker.type=container \
    busybox:1 /bin/busybox sleep 3600 2>>"$RESULTS/engines.txt"); then
    load 0 "$(docker inspect --format '{{.State.Pid}}' kubelet-pod)"
    kubelet_pod=$id
else
    kubelet_pod=
fi

start_agent plain || cell agent failed "$(tail -n 1 "$RESULTS/agent-plain.txt" | cut -c 1-160)"
gpu-sampler doctor >"$RESULTS/doctor.txt" 2>&1 || true
case $(cat /proc/cmdline) in
*legacy_systemd_cgroup_controller*) layout=v1 ;;
*unified_cgroup_hierarchy=0*) layout=hybrid ;;
*) layout=v2 ;;
esac
lockdown=$(sed -n 's/.*lockdown=\([a-z]*\).*/\1/p' /proc/cmdline)
if [ -n "$lockdown" ] && ! grep -q "\[$lockdown\]" /sys/kernel/security/lockdown; then
    cell lockdown failed "the kernel is not in lockdown=$lockdown"
fi
found=$(sed -n 's/^[a-z]* *cgroups *\([a-z0-9]*\):.*/\1/p' "$RESULTS/doctor.txt" | head -n 1)
if [ "$(kernel_mode), cgroups $found" = "$mode, cgroups $layout" ]; then
    cell "kernel mode" ok "$mode, cgroups $found"
else
    cell "kernel mode" failed "$(kernel_mode), cgroups $found instead of $mode, cgroups $layout"
fi
for known in $before; do
    name=${known%%:*}
    case $name in
    podman-rootless) engine_is_attributed "$name" "${known#*:}" rootless podman ;;
    podman-runc) engine_is_attributed "$name" "${known#*:}" podman --runtime runc ;;
    *) engine_is_attributed "$name" "${known#*:}" "$name" ;;
    esac
done
pod_is_attributed() {
    get '/metrics' >metrics.txt 2>/dev/null || return 1
    grep -q '^container_gpu_seconds_total{.*namespace="serving",pod="llm-0",container="server"' metrics.txt
}
if [ -z "$kubelet_pod" ]; then
    cell "pod in kubepods.slice" absent "Docker refuses the slice"
elif within 60 pod_is_attributed; then
    cell "pod in kubepods.slice" ok "namespace, pod and container"
else
    cell "pod in kubepods.slice" failed "no GPU time with the labels of the pod"
fi
stop_agent
waits

if storm-check --storms 2 --lives 2000 --within 5 >"$RESULTS/storms.txt" 2>&1; then
    cell "storms of processes" ok "$(tail -n 1 "$RESULTS/storms.txt" | cut -c 1-120)"
elif [ $layout = v1 ]; then
    cell "storms of processes" absent "compares with cgroups of version 2"
elif [ $mode = raw_tracepoint ]; then
    cell "storms of processes" failed "$(tail -n 1 "$RESULTS/storms.txt" | cut -c 1-160)"
else
    cell "storms of processes" absent "needs kernel events"
fi

# The first container that an engine started.
known=${before# }
known=${known%% *}
known_id=${known#*:}
# variant CELL MODE COMMAND ..: the agent in other circumstances, and the mode that it has to be in.
variant() {
    name=$1 expected=$2
    shift 2
    if ! start_agent "$(echo "$name" | tr ' ' -)" "$@"; then
        cell "$name" failed "$(tail -n 1 "$agent_log" | cut -c 1-160)"
    elif [ "$(kernel_mode)" != "$expected" ]; then
        cell "$name" failed "kernel mode $(kernel_mode) instead of $expected"
    elif [ -n "$known" ] && within 60 is_attributed "$known_id" "${known%%:*}-before"; then
        cell "$name" ok "kernel mode $expected$note"
    else
        cell "$name" failed "no GPU time or labels of a container"
    fi
    stop_agent
}
note=
variant "without BTF" inotify unshare --mount sh -c 'mount --bind /dev/null /sys/kernel/btf/vmlinux && exec "$@"' sh
variant "raw tracepoints refused" inotify python3 refuse-raw-tracepoints.py
# Another user with the capabilities of the package's unit, and its limit of locked memory.
capabilities=-all,+bpf,+perfmon,+sys_ptrace,+dac_read_search
variant "capabilities of the unit" $mode prlimit --memlock=67108864 setpriv --reuid 65534 --regid 65534 --clear-groups --no-new-privs \
    --inh-caps=$capabilities --ambient-caps=$capabilities --bounding-set=$capabilities
# The script removes the program, and purges its package at the end. It has a debugger, which the settings below forbid until the next boot.
if [ -e package.sh ] && [ $layout = v2 ] && [ $mode = raw_tracepoint ]; then
    program=$(command -v gpu-sampler)
    cp "$program" gpu-sampler.kept
    result=ok
    sh package.sh >"$RESULTS/package.txt" 2>&1 || result=failed
    cat "$RESULTS/package.txt"
    if [ $result = ok ]; then
        cell package ok "$(grep -c '^package: ' "$RESULTS/package.txt") steps"
    else
        cell package failed "$(grep '^package: ' "$RESULTS/package.txt" | tail -n 1 | cut -c 1-160)"
        systemctl stop gpu-sampler.service || true
    fi
    mv gpu-sampler.kept "$program"
fi
for setting in kernel.unprivileged_bpf_disabled=2 kernel.perf_event_paranoid=4 kernel.kptr_restrict=2 net.core.bpf_jit_harden=2 \
    kernel.yama.ptrace_scope=3; do
    sysctl -q -w $setting 2>/dev/null && [ "$(sysctl -n "${setting%=*}")" = "${setting#*=}" ] || note="$note, without $setting"
done
variant "strict sysctls" $mode
[ -z "$note" ] || cell "strict sysctls" failed "the kernel refused a setting$note"
note=
if [ $mode = inotify ]; then
    # Without kernel events, /proc is all there is, and its paths are relative to that namespace.
    start_agent namespace unshare --cgroup || true
    if get /metrics | grep -q '^gpu_sampler_degraded{condition="cgroups"} 1$'; then
        cell "cgroup namespace of its own" absent "needs kernel events; the agent says so (condition cgroups)"
    else
        cell "cgroup namespace of its own" failed "the agent is not degraded by it"
    fi
    stop_agent
else
    variant "cgroup namespace of its own" $mode unshare --cgroup
fi
if [ $mode = raw_tracepoint ] && ! [ -s "$RESULTS/verifier.tsv" ]; then
    cell "verifier" failed "no figures of the programs were written"
fi
! cut -f 2 "$cells" | grep -qx failed
