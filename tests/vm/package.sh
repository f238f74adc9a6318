#!/bin/sh
# In a machine with systemd as its first process: the .deb is installed, upgraded, removed and purged; its unit attributes neighbours in
# containers with exactly its capabilities, and each of them is needed; the watchdog ends a core thread that hangs, and a driver call that
# hangs is left alone.
#
#     cargo xtask package
#     cargo xtask vm 6.1 --with target/dist/gpu-sampler_0.1.0-1_amd64.deb --with tests/vm/lib.sh --with tests/vm/package.sh -- sh package.sh
set -eu

# The program of the package is under test.
rm -f "${GPU_SAMPLER_BIN:?}"
unit=gpu-sampler.service
sim=/var/lib/nvml-sim
drop_in=/etc/systemd/system/$unit.d
all="CAP_BPF CAP_PERFMON CAP_SYS_PTRACE CAP_DAC_READ_SEARCH"

test=package
. ./lib.sh

failed() {
    get '/metrics?collect[]=all' >"$RESULTS/metrics-at-failure.txt" 2>&1 || true
    gpu-sampler explain --container neighbour >"$RESULTS/explain-at-failure.txt" 2>&1 || true
    ps -ef >"$RESULTS/processes.txt" || true
    systemctl status --no-pager --full "$unit" >&2 || true
    journalctl --unit "$unit" --no-pager --lines 60 >&2 || true
}

property() {
    systemctl show --property "$1" --value "$unit"
}

pid() {
    property MainPID
}

is_active() {
    [ "$(property ActiveState)/$(property SubState)" = active/running ]
}

# The hexadecimal mask of names of capabilities, as /proc shows it.
mask() {
    python3 - "$@" <<'PYTHON'
import sys
numbers = {"CAP_DAC_READ_SEARCH": 2, "CAP_SYS_PTRACE": 19, "CAP_PERFMON": 38, "CAP_BPF": 39}
print("%016x" % sum(1 << numbers[name] for name in sys.argv[1:]))
PYTHON
}

restart() {
    systemctl daemon-reload
    systemctl restart "$unit" || return 1
}

dpkg_quietly() {
    dpkg "$@" </dev/null >dpkg.log 2>&1 || { cat dpkg.log >&2; fail "dpkg $* failed"; }
}

# Installation: with no GPU and no driver.
deb=$(ls gpu-sampler_*.deb)
dpkg_quietly --install "$deb"
within 60 is_active || fail "not active after the installation"
[ "$(systemctl is-enabled "$unit")" = enabled ] || fail "not enabled after the installation"
[ "$(get /readyz)" ] || fail "not ready"
[ "$(awk '$1 == "Uid:" { print $2 }' "/proc/$(pid)/status")" = "$(id -u gpu-sampler)" ] || fail "not run by its user"
[ "$(stat -c '%U %a' /var/lib/gpu-sampler)" = "gpu-sampler 700" ] || fail "the state is not the user's alone"
systemctl show --property StatusText --value "$unit" | grep -q "listening on 127.0.0.1:9836" || fail "no status text"
passed "active without a GPU: $(property StatusText)"

# Simulated GPUs: the nodes of real ones do not exist here.
nvml-sim init --dir "$sim" --gpus 2 >/dev/null
chown -R gpu-sampler:gpu-sampler "$sim"
mkdir -p "$drop_in"
cat >"$drop_in/simulated.conf" <<UNIT
[Service]
Environment=NVML_SIM_DIR=$sim GPU_SAMPLER_NVML_LIB=$sim/lib/libnvidia-ml.so.1 GPU_SAMPLER_GPU_BUDGET_PERCENT=100 GPU_SAMPLER_GPU_WAIT_PERCENT=100
ReadWritePaths=$sim
WatchdogSec=10s
UNIT
restart || fail "does not start with simulated GPUs"
grep -q "^CapEff:.$(mask $all)$" "/proc/$(pid)/status" || fail "effective: $(grep CapEff "/proc/$(pid)/status"), not $(mask $all)"
grep -q "^CapBnd:.$(mask $all)$" "/proc/$(pid)/status" || fail "bounding: $(grep CapBnd "/proc/$(pid)/status")"
grep -q "^NoNewPrivs:.1$" "/proc/$(pid)/status" || fail "new privileges are possible"
grep -q "^Seccomp:.2$" "/proc/$(pid)/status" || fail "no filter of system calls"
passed "capabilities $(mask $all): $all"

# Neighbours in containers of Docker and podman, with labels from files: the user may not use the engines' sockets.
systemctl start docker.service
import_image docker
docker=$(docker run --detach --name neighbour --network none --security-opt apparmor=unconfined busybox:1 /bin/busybox sleep 3600)
import_image podman
podman=$(podman run --detach --name other --network none busybox:1 /bin/busybox sleep 3600)
nvml-sim load --dir "$sim" --gpu 0 --demand 0.6 --pid "$(docker inspect --format '{{.State.Pid}}' neighbour)" >/dev/null &
nvml-sim load --dir "$sim" --gpu 1 --demand 0.4 --pid "$(podman inspect --format '{{.State.Pid}}' other)" >/dev/null &
within 90 is_attributed "$docker" neighbour || fail "the container of Docker has no GPU time or labels"
within 90 is_attributed "$podman" other || fail "the container of podman has no GPU time or labels"
[ "$(kernel_mode)" = raw_tracepoint ] || fail "kernel mode $(kernel_mode)"
passed "containers of Docker and podman have GPU time and labels; kernel mode $(kernel_mode)"
gpu-sampler doctor >doctor.txt 2>&1 || { cat doctor.txt >&2; fail "doctor finds a failure"; }
cp doctor.txt metrics.txt "$RESULTS"
grep -v " ok " doctor.txt | head -n 20 || true

# Wait probes with what the unit may: its user, capabilities, system calls and mounts. Perf events need CAP_SYS_ADMIN, which it does not have.
cuda-work run --dir "$sim" --gpu 1 --kernel 4ms --every 20ms --for 10m >/dev/null 2>"$RESULTS/cuda-work-of-package.txt" &
worker=$!
sleep 10
gpu-sampler record --wait-probes=pid=$worker --duration 15s --output waits.gpus >record.txt 2>&1 || { cat record.txt >&2; fail "record"; }
waits_of waits.gpus >waits.txt || fail "the session has no report"
kill $worker
problem=$(cut -f 3 waits.txt)
if kernel_is 6.6; then
    [ -z "$problem" ] && counts_waiting waits.txt || fail "wait probes: $(waiting_in_words waits.txt): $problem"
    passed "wait probes: $(waiting_in_words waits.txt)"
else
    case $problem in
    *keep_capability* | *"they require Linux 5.15"*) passed "wait probes are refused: $problem" ;;
    *) fail "wait probes: $(waiting_in_words waits.txt): $problem" ;;
    esac
fi

# The journal: one time, one priority a line.
journalctl --unit "$unit" --output cat --no-pager >log.txt
! grep -E "^(<[0-9]>)?[0-9]{4}-[0-9]{2}-[0-9]{2}T|^<[0-9]>|$(printf '\033')" log.txt || fail "log lines have times or colours of their own"
journalctl --unit "$unit" --output cat --priority warning --no-pager | grep -q . || fail "no line has the priority of a warning"
passed "log: $(tail -n 1 log.txt)"

# A driver call that hangs for longer than the watchdog: the unit stays as it is.
before=$(pid)
nvml-sim fault --dir "$sim" --gpu 1 --kind stall --for 25s
sleep 30
[ "$(pid)" = "$before" ] && is_active || fail "a driver call that hangs restarted the unit"
passed "a driver call that hung for 25 s did not restart the unit, with a watchdog of 10 s"

# A core thread that hangs, while all other threads run: a debugger holds it.
core=$(basename "$(dirname "$(grep -l '^core$' /proc/"$before"/task/*/comm)")")
python3 - "$core" <<'PYTHON' &
import ctypes, os, sys
thread, wait_for_threads = int(sys.argv[1]), 0x40000000
if ctypes.CDLL(None, use_errno=True).ptrace(16, thread, 0, 0):
    sys.exit("PTRACE_ATTACH failed")
os.waitpid(thread, wait_for_threads)
# Until it is killed, which a debugger has to collect.
os.waitpid(thread, wait_for_threads)
PYTHON
sleep 3
get /healthz >/dev/null || fail "other threads do not run while the core thread is held"
restarted() {
    [ "$(pid)" != "$before" ] && is_active
}
within 60 restarted || fail "the watchdog did not restart the unit"
[ "$(property NRestarts)" = 1 ] || fail "$(property NRestarts) restarts"
journalctl --unit "$unit" --no-pager | grep -q "Watchdog timeout" || fail "restarted, but not by the watchdog"
within 90 is_attributed "$docker" neighbour || fail "no GPU time after the watchdog's restart"
passed "the watchdog restarted the unit when the core thread hung"

# Each capability is needed: what is lost without it.
for missing in $all; do
    rest=$(echo "$all" | sed "s/$missing//")
    printf '[Service]\nAmbientCapabilities=\nAmbientCapabilities=%s\nCapabilityBoundingSet=\nCapabilityBoundingSet=%s\n' "$rest" "$rest" \
        >"$drop_in/less.conf"
    restart || fail "does not start without $missing"
    if [ "$(kernel_mode)" != raw_tracepoint ]; then
        lost="kernel mode $(kernel_mode)"
    elif ! within 30 is_attributed "$docker" neighbour || ! within 30 is_attributed "$podman" other; then
        lost="labels or GPU time of a container"
    elif ! get '/metrics?collect[]=all' | grep -q '^gpu_sampler_pid_space{state="local"} 1$'; then
        lost="the PIDs of the driver are not verified"
    else
        fail "nothing that this test reads is lost without $missing"
    fi
    passed "without $missing: $lost"
done
rm "$drop_in/less.conf"
restart || fail "does not start again"

passed "$(systemd-analyze security --no-pager "$unit" | tail -n 1)"

# Upgrade to a second version: an edited configuration stays, and the unit is restarted once.
sed -i 's/^#: gpu_saturation_percent = .*/gpu_saturation_percent = 80/' /etc/gpu-sampler/config.toml
gpu-sampler config --check /etc/gpu-sampler/config.toml >/dev/null || fail "the edited configuration is not valid"
dpkg-deb --raw-extract "$deb" newer
sed -i 's/^Version: .*/Version: 0.1.0-2/' newer/DEBIAN/control
dpkg-deb --build -Znone newer newer.deb >/dev/null
starts() {
    journalctl --unit "$unit" --no-pager | grep -c "Started $unit"
}
starts_before=$(starts)
before=$(pid)
dpkg_quietly --install newer.deb
within 60 restarted || fail "not restarted by the upgrade"
[ "$(starts)" -eq $((starts_before + 1)) ] || fail "started $(starts) times, $starts_before before the upgrade"
grep -q '^gpu_saturation_percent = 80$' /etc/gpu-sampler/config.toml || fail "the upgrade replaced an edited configuration"
within 90 is_attributed "$docker" neighbour || fail "no GPU time after the upgrade"
passed "upgraded to $(dpkg-query --show --showformat '${Version}' gpu-sampler): restarted once, edited configuration kept"

# An upgrade does not enable a unit that the administrator has disabled.
systemctl disable --now "$unit" >/dev/null 2>&1
sed -i 's/^Version: .*/Version: 0.1.0-3/' newer/DEBIAN/control
dpkg-deb --build -Znone newer newest.deb >/dev/null
dpkg_quietly --install newest.deb
[ "$(systemctl is-enabled "$unit" || true)" = disabled ] || fail "an upgrade enabled a disabled unit"
passed "after an upgrade, a disabled unit is $(systemctl is-enabled "$unit" || true) and $(systemctl is-active "$unit" || true)"

# Removal keeps configuration, state and user; a purge removes them.
systemctl enable --now "$unit" >/dev/null 2>&1
dpkg_quietly --remove gpu-sampler
! is_active || fail "active after the removal"
[ ! -e /usr/bin/gpu-sampler ] || fail "the program stays after the removal"
[ -f /etc/gpu-sampler/config.toml ] && [ -d /var/lib/gpu-sampler ] && getent passwd gpu-sampler >/dev/null ||
    fail "the removal took configuration, state or user"
dpkg_quietly --purge gpu-sampler
[ ! -e /etc/gpu-sampler ] || fail "the configuration stays after a purge: $(ls /etc/gpu-sampler)"
[ ! -e /var/lib/gpu-sampler ] || fail "the state stays after a purge"
! getent passwd gpu-sampler || fail "the user stays after a purge"
! getent group gpu-sampler || fail "the group stays after a purge"
[ -z "$(find /etc/systemd/system -name 'gpu-sampler.service' 2>/dev/null)" ] || fail "a link or mask of the unit stays after a purge"
passed "removed and purged"
echo "package: passed"
