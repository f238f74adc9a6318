# At least 1: an upgrade. The new unit and program are in place.
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload || :
    if [ "$1" -ge 1 ]; then
        systemctl try-restart gpu-sampler.service || :
    fi
fi
