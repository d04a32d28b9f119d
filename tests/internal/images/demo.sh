#!/bin/sh
# Makes the demo image's directories in $1: base (a root), python (an overlay's upper directory on top of it).
# Runs in a mount namespace of its own, so that no mount outlives it.
set -eu
work=$1
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
fast='-qq -o Acquire::Retries=3 -o Dpkg::Options::=--force-unsafe-io -o Dpkg::Use-Pty=0'

# What differs from one build to the next, or says something about this machine, is no part of the image.
scrub() {
	rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/* "$1"/var/log/* "$1"/var/cache/debconf/*-old \
		"$1"/var/cache/ldconfig/* "$1"/tmp/* "$1"/root/.cache
	find "$1" -name __pycache__ -prune -exec rm -rf {} +
}

mkdir -p "$work/python" "$work/scratch" "$work/root"
bootstrap() {
	rm -rf "$work/base"
	debootstrap --variant=minbase bookworm "$work/base" >"$work/debootstrap.log" 2>&1 </dev/null
}
# A mirror that fails once is no reason to give up; apt tries again by itself.
bootstrap || bootstrap || {
	tail -20 "$work/debootstrap.log" >&2
	exit 1
}
rm -f "$work/base/etc/resolv.conf" "$work/base/etc/hostname"
scrub "$work/base"

mount -t overlay overlay "$work/root" \
	-o "lowerdir=$work/base,upperdir=$work/python,workdir=$work/scratch,redirect_dir=off,metacopy=off,index=off"
mount -t proc proc "$work/root/proc"
cp /etc/resolv.conf "$work/root/etc/resolv.conf"
# No service is to start in there.
printf '#!/bin/sh\nexit 101\n' >"$work/root/usr/sbin/policy-rc.d"
chmod 755 "$work/root/usr/sbin/policy-rc.d"
chroot "$work/root" apt-get $fast update
chroot "$work/root" apt-get $fast install -y --no-install-recommends \
	python3 python3-numpy python3-pandas git >"$work/apt.log" 2>&1 || {
	tail -20 "$work/apt.log" >&2
	exit 1
}
umount "$work/root/proc"
rm "$work/root/usr/sbin/policy-rc.d" "$work/root/etc/resolv.conf"
scrub "$work/root"
umount "$work/root"
