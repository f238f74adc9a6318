systemd-sysusers gpu-sampler.conf
# 1: the first installation. Whether the unit is enabled is the distribution's decision (systemd.preset(5)); none starts it here.
if [ "$1" -eq 1 ]; then
    systemctl --no-reload preset gpu-sampler.service || :
fi
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload || :
fi
