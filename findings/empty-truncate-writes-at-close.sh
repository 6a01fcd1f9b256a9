#!/bin/sh
# On ext4, ftruncate(fd, 0) of a file that is empty already makes its close() write all of it out.
#
# One would guess: to cut a new file to length 0 does nothing, and close() leaves what was written
#   in the page cache for later.
# What is so: ext4 takes it for a file that is about to be replaced.  close() then finds room for
#   all blocks that have none yet and begins to write the whole file; the caller waits until that
#   is under way.  One block without room is enough: what fallocate() had found room for before is
#   written as well.  With room for every block, close() leaves all of it alone.
# Seen with: Linux 6.18 on amd64, ext4 with its defaults (auto_da_alloc).
# Output seen: not cut: 2048 of 2048 blocks have no room after close
#              cut: 0 of 2048 blocks have no room after close
#              cut, room for all but the first: 0 of 2048 blocks not written after close
#              cut, room for all: 2048 of 2048 blocks not written after close
# Why it matters: QEMU cuts the file of every `file:` migration, new or not.  A snapshot of a guest
#   of 256 MiB was seen to spend 100 to 200 ms in close(), after "completed", next to the guest.
#   An engine that reserves room must begin at the first byte, and not at the first one it writes.
#
# Needs: a temporary folder (TMPDIR) on ext4, python3, and an idle disk for a second or two.

set -eu
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
trap 'exit 1' HUP INT TERM

kind=$(stat -f -c %T "$work")
if [ "$kind" != ext2/ext3 ]; then
    echo "TMPDIR is on $kind, and not on ext4"
    exit 1
fi

cat > "$work/finding.py" << 'END'
import ctypes
import fcntl
import os
import struct
import sys
import time

BLOCK, BLOCKS = 4096, 2048
FS_IOC_FIEMAP = 0xC020660B
DELALLOC, UNWRITTEN = 0x4, 0x800
KEEP_SIZE = 1
libc = ctypes.CDLL(None, use_errno=True)


def blocks_with(fd, flag):
    """How many blocks of the file are in extents with this flag; nothing is written for that."""
    room = 256
    query = bytearray(struct.pack("=QQIIII", 0, 2**64 - 1, 0, 0, room, 0) + bytes(56 * room))
    fcntl.ioctl(fd, FS_IOC_FIEMAP, query)
    mapped = struct.unpack_from("=I", query, 20)[0]
    assert mapped < room
    extents = (struct.unpack_from("=QQQQQIIII", query, 32 + 56 * at) for at in range(mapped))
    return sum(length // BLOCK for _, _, length, _, _, flags, *_ in extents if flags & flag)


def written(name, cut, room_from=None):
    """Write a new file and close it."""
    path = os.path.join(sys.argv[1], name)
    fd = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
    if cut:
        os.ftruncate(fd, 0)
    if room_from is not None:
        size = ctypes.c_longlong(BLOCKS * BLOCK - room_from)
        if libc.fallocate(fd, KEEP_SIZE, ctypes.c_longlong(room_from), size):
            sys.exit(f"fallocate: {os.strerror(ctypes.get_errno())}")
    for _ in range(BLOCKS):
        os.write(fd, b"x" * BLOCK)
    os.close(fd)
    return os.open(path, os.O_RDONLY)


for name, cut in (("not cut", False), ("cut", True)):
    fd = written(name, cut)
    print(f"{name}: {blocks_with(fd, DELALLOC)} of {BLOCKS} blocks have no room after close")
for name, room_from in (("cut, room for all but the first", BLOCK), ("cut, room for all", 0)):
    fd = written(name, True, room_from)
    # What is being written is done soon; what is not waits for some 30 s.
    time.sleep(2)
    print(f"{name}: {blocks_with(fd, UNWRITTEN)} of {BLOCKS} blocks not written after close")
END

python3 "$work/finding.py" "$work" > "$work/seen"
cat "$work/seen"
cat > "$work/expected" << 'END'
not cut: 2048 of 2048 blocks have no room after close
cut: 0 of 2048 blocks have no room after close
cut, room for all but the first: 0 of 2048 blocks not written after close
cut, room for all: 2048 of 2048 blocks not written after close
END
diff "$work/expected" "$work/seen"
