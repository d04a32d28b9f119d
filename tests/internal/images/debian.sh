#!/bin/sh
# debian.sh base DIR makes DIR, a Debian root.
# debian.sh layers BASE WORK makes directories in WORK for the layers of an image on top of BASE, such a root: for each
# further three arguments NAME ON COMMANDS, NAME: an overlay's upper directory with what COMMANDS changed when they ran
# as root on top of the layers before, or of BASE alone where ON says base.
# Runs in a mount namespace of its own, so that no mount outlives it.
set -eu
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8

# What differs from one build to the next, or says something about this machine, is no part of the image.
scrub() {
	rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/* "$1"/var/log/* "$1"/var/cache/debconf/*-old \
		"$1"/var/cache/ldconfig/* "$1"/tmp/* "$1"/root/.cache "$1"/root/.npm
}

# quietly NAME COMMAND... shows the end of COMMAND's output when it fails.
quietly() {
	log=$work/$1.log
	shift
	"$@" >"$log" 2>&1 </dev/null || {
		tail -20 "$log" >&2
		return 1
	}
}

# inside ROOT COMMAND... runs COMMAND as it would anywhere: an environment that, say, keeps Python from compiling what is
# installed would make another image. Only the way to the network is this machine's.
inside() {
	root=$1
	shift
	for name in http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY; do
		eval "value=\${$name-}"
		[ -z "$value" ] || set -- "$name=$value" "$@"
	done
	chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root "DEBIAN_FRONTEND=$DEBIAN_FRONTEND" "LC_ALL=$LC_ALL" "$@"
}

bootstrap() {
	rm -rf "$1"
	quietly debootstrap debootstrap --variant=minbase bookworm "$1"
}

# base DIR. A mirror that fails once is no reason to give up; apt tries again by itself.
base() {
	work=$(dirname "$1")
	bootstrap "$1" || bootstrap "$1"
	rm -f "$1/etc/resolv.conf" "$1/etc/hostname"
	scrub "$1"
}

# stack NAME COMMANDS LOWERDIRS
stack() {
	mkdir -p "$work/$1" "$work/scratch-$1" "$work/root"
	mount -t overlay overlay "$work/root" \
		-o "lowerdir=$3,upperdir=$work/$1,workdir=$work/scratch-$1,redirect_dir=off,metacopy=off,index=off"
	mount -t proc proc "$work/root/proc"
	cp /etc/resolv.conf "$work/root/etc/resolv.conf"
	# The authorities that this machine trusts, for programs that bring their own list.
	[ ! -e /etc/ssl/certs/ca-certificates.crt ] || cp /etc/ssl/certs/ca-certificates.crt "$work/root/tmp/trusted.crt"
	# No service is to start in there.
	printf '#!/bin/sh\nexit 101\n' >"$work/root/usr/sbin/policy-rc.d"
	chmod 755 "$work/root/usr/sbin/policy-rc.d"
	quietly "$1" inside "$work/root" sh -euc "$2"
	umount "$work/root/proc"
	rm "$work/root/usr/sbin/policy-rc.d" "$work/root/etc/resolv.conf"
	scrub "$work/root"
	umount "$work/root"
}

# layers BASE WORK [NAME ON COMMANDS]...
layers() {
	base=$1 below=$1 work=$2
	shift 2
	while [ $# -gt 0 ]; do
		case $2 in
		base) stack "$1" "$3" "$base" ;;
		*)
			stack "$1" "$3" "$below"
			below=$work/$1:$below
			;;
		esac
		shift 3
	done
}

"$@"
