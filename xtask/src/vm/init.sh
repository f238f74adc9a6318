#!/bin/busybox sh
# Finds the root file system on the first disk, mounts the kernel's modules from the fourth disk into it, and starts its init.
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
if grep -q vm.probe /proc/cmdline; then
    echo "vm: this accelerator boots this kernel"
    poweroff -f
fi
for module in /modules/*.ko; do
    [ -e "$module" ] && insmod "$module"
done
n=0
while [ ! -b /dev/vdd ] && [ $n -lt 60 ]; do
    sleep 0.5
    n=$((n + 1))
done
mount -t ext4 /dev/vda /root || exec poweroff -f
mkdir -p /root/usr/lib/modules
mount -t ext4 -o ro /dev/vdd /root/usr/lib/modules || exec poweroff -f
umount /proc
umount /sys
mount --move /dev /root/dev
exec switch_root /root /sbin/init
