#!/bin/sh
# Runs the command from the second disk, writes its results to the third, and powers the machine off.
stty -F /dev/ttyS1 raw -echo
exec >/dev/ttyS1 2>&1 </dev/null
mkdir -p /results
export PATH="/opt/gpu-sampler:$PATH" HOME=/root RESULTS=/results
export GPU_SAMPLER_BIN=/opt/gpu-sampler/gpu-sampler NVML_SIM_BIN=/opt/gpu-sampler/nvml-sim
export NVML_SIM_LIBRARY=/opt/gpu-sampler/libnvidia_ml_sim.so CUDA_SIM_LIBRARY=/opt/gpu-sampler/libcuda_sim.so
sh ./command
echo $? >/results/exit-status
journalctl --boot --no-pager >/results/journal.txt 2>&1
tar -cf /dev/vdc -C /results .
sync
systemctl poweroff --force --force >/dev/null 2>&1
