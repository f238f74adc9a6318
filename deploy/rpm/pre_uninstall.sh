# 0: removal, not an upgrade.
if [ "$1" -eq 0 ]; then
    if [ -d /run/systemd/system ]; then
        systemctl --no-reload disable --now gpu-sampler.service || :
    else
        systemctl --no-reload disable gpu-sampler.service || :
    fi
fi
