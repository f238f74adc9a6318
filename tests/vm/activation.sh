#!/bin/sh
# In a machine with systemd as its first process: an engine that was stopped with its socket unit active stays stopped for a minute while the
# agent runs, and is queried again as soon as it is started.
#
#     cargo xtask vm 6.1 --with tests/vm/lib.sh --with tests/vm/activation.sh -- sh activation.sh
set -eu
test=activation
. ./lib.sh

failed() {
    tail -n 40 agent.log >&2
}

engine_is() {
    [ "$(systemctl is-active docker.service || true)" = "$1" ] || fail "docker.service is not $1 $2"
}

# A container of an image without a registry; prints its id.
container() {
    docker run --detach --network none --security-opt apparmor=unconfined busybox:1 /bin/busybox sleep 600
}

# Whether the agent has the name of the container, from the engine itself: it reads no file of Docker.
is_named() {
    gpu-sampler explain --container "$1" --json 2>/dev/null | grep -q '"missing": \[\]'
}

named() {
    within 60 is_named "$1" || fail "no label of $1 within 60 s"
    passed "labels from the engine after $tries s"
}

systemctl start docker.socket
nvml-sim init --dir sim >/dev/null
NVML_SIM_DIR=$PWD/sim gpu-sampler run --nvml-lib sim/lib/libnvidia-ml.so.1 --label-sources docker \
    --gpu-budget-percent 100 >agent.log 2>&1 &

sleep 60
engine_is inactive "after a minute with an active socket"

systemctl start docker.service
import_image docker
named "$(container)"

systemctl stop docker.service 2>/dev/null
engine_is inactive "after it was stopped"
sleep 60
engine_is inactive "a minute after it was stopped"
systemctl is-active --quiet docker.socket || fail "docker.socket is not active"

systemctl start docker.service
named "$(container)"
passed passed
