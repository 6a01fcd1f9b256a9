#!/bin/sh
# `qemu-img info` refuses a qcow2 image that is in use, and not a raw one.
#
# One would guess: without -U (--force-share) qemu-img refuses any image that another QEMU has open
#   for writing, so that its failure tells whether an image is in use.
# What is so: of a raw image it reads no data for this, asks for no lock, and reports it as if
#   nobody had it.  `qemu-img check` and `convert` do not help: the first knows no raw images, the
#   second reads all of it.
# Seen with: qemu-img and qemu-io 7.2 of Debian 12 (1:7.2+dfsg-7+deb12u18+b3).
# Output seen: qcow2 in use: refused
#              raw in use: reported
# Why it matters: a tool that puts an overlay on an image, and asks in this way whether a VM is
#   writing to it, makes a disk that changes below its guest.  QEMU's locks are locks of bytes of
#   the file (101 and 200, say for writing): ask the kernel for those.
#
# Needs: Debian 12 on amd64 with current package lists (apt-get download).  Libraries that are not
# here come the same way.  No root.

set -eu
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
trap 'exit 1' HUP INT TERM
cd "$work"
apt-get download -q qemu-utils=1:7.2+dfsg-7+deb12u18+b3 liburing2=2.3-3 > apt 2>&1 \
    || { cat apt >&2; exit 1; }
for package in *.deb; do
    dpkg -x "$package" tree
done
export LD_LIBRARY_PATH="$work/tree/usr/lib/x86_64-linux-gnu:$work/tree/lib/x86_64-linux-gnu"
bin="$work/tree/usr/bin"
"$bin/qemu-img" --version | head -n 1

wrong=0
for format in qcow2 raw; do
    "$bin/qemu-img" create -q -f "$format" "$format.img" 1M
    # It holds the image open for writing until it may end.
    mkfifo "go-$format"
    "$bin/qemu-io" -f "$format" "$format.img" < "go-$format" > /dev/null &
    exec 3> "go-$format"
    echo "write -q 0 4096" >&3
    sleep 1
    if "$bin/qemu-img" info -f "$format" "$format.img" > said 2>&1; then
        seen=reported
    else
        grep -q "lock" said || { cat said >&2; exit 1; }
        seen=refused
    fi
    exec 3>&-
    wait
    echo "$format in use: $seen"
    case "$format $seen" in
    "qcow2 refused" | "raw reported") ;;
    *) wrong=1 ;;
    esac
done
exit "$wrong"
