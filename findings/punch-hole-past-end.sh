#!/bin/sh
# Punching a hole does not give back what fallocate reserved past the end of a file on ext4.
#
# One would guess: fallocate(PUNCH_HOLE | KEEP_SIZE) over a range frees its blocks, also those
#   that fallocate(KEEP_SIZE) reserved beyond the end of the file.
# What is so: the call reports success, and past the end of the file nothing is freed, even when
#   the hole begins before it.  ftruncate to the very size that the file has frees all of it.
# Seen with: Linux 6.18 on amd64, ext4 as made by mkfs.ext4 1.47.0.
# Output seen: KiB in use: reserved 66561, punched 66049, truncated to its size 513
# Why it matters: room for an image is best reserved before it is written.  What is not needed
#   stays with the file for good, unseen in its size, unless it is truncated at the end.
#
# Needs: root (a loop mount in a mount namespace of its own), mkfs.ext4, Python 3.

set -eu
test "$(id -u)" = 0 || { echo "needs root" >&2; exit 1; }
if [ "${1-}" != inside ]; then
    work=$(mktemp -d)
    trap 'rm -r "$work"' EXIT
    trap 'exit 1' HUP INT TERM
    truncate -s 300M "$work/disk"
    mkfs.ext4 -q "$work/disk"
    mkdir "$work/mounted"
    # The mount, and with it the loop device, ends with the last process in the namespace.
    unshare --mount sh "$0" inside "$work"
    exit
fi

mount -o loop "$2/disk" "$2/mounted"
uname -sr
python3 - "$2/mounted/image" << 'END'
import ctypes
import os
import sys

KEEP_SIZE, PUNCH_HOLE = 1, 2
MIB = 1 << 20
libc = ctypes.CDLL(None, use_errno=True)
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)


def fallocate(mode, start, length):
    start, length = ctypes.c_int64(start), ctypes.c_int64(length)
    if libc.fallocate(file, mode, start, length):
        raise OSError(ctypes.get_errno(), "fallocate")


def used_kib():
    os.fsync(file)
    return os.fstat(file).st_blocks // 2


os.write(file, b"x" * MIB)
fallocate(KEEP_SIZE, MIB, 64 * MIB)
reserved = used_kib()
fallocate(PUNCH_HOLE | KEEP_SIZE, MIB // 2, 65 * MIB)
fallocate(PUNCH_HOLE | KEEP_SIZE, MIB, 64 * MIB)
punched = used_kib()
os.ftruncate(file, MIB)
truncated = used_kib()
print(f"KiB in use: reserved {reserved}, punched {punched}, truncated to its size {truncated}")
# Half a mebibyte is before the end, and is given back as it should be.
sys.exit(not (reserved > 65 * 1024 and reserved - punched == 512 and truncated <= 513))
END
