#!/bin/sh
# Mapping the same memfd a second time takes it out of a process's USS, and doubles its RSS.
#
# One would guess: psutil's USS, the memory that only this process has, counts a memfd's pages
#   however often this one process maps them, since they are freed when it ends.
# What is so: the kernel calls a page private when it is mapped once, not when it is mapped by one
#   process.  With a second mapping the same pages count as shared: USS falls by all of them, RSS
#   counts them twice, and only PSS stays.
# Seen with: psutil 7.2.2, Python 3.11, Linux 6.18.
# Output seen (MiB more than before): mapped once: rss 64, uss 64, pss 64
#                                     mapped twice: rss 128, uss 0, pss 64
# Why it matters: guest memory is mapped a second time to look at it, or to build an alias of it.
#   A figure of "what this snapshot costs in memory" by USS then loses the guest.  Use PSS.
#
# Needs: Linux with smaps_rollup or smaps, Python 3.9 or later, and the network for pip.

set -eu
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m pip install -q --target "$work/packages" psutil==7.2.2 2> "$work/pip" \
    || { cat "$work/pip" >&2; exit 1; }

PYTHONPATH="$work/packages" python3 - << 'END'
import mmap
import os
import platform
import sys

import psutil

SIZE_MIB = 64
PAGE = mmap.PAGESIZE
size = SIZE_MIB << 20
file = os.memfd_create("guest")
os.ftruncate(file, size)
process = psutil.Process()


def mib():
    memory = process.memory_full_info()
    return [memory.rss / 2**20, memory.uss / 2**20, memory.pss / 2**20]


def mapped():
    memory = mmap.mmap(file, size)
    for start in range(0, size, PAGE):
        memory[start] = 1
    return memory


print("psutil", psutil.__version__, "Linux", platform.release())
mib()
before = mib()
mappings = []
right = True
for name, expected in ("once", (1, 1, 1)), ("twice", (2, 0, 1)):
    mappings.append(mapped())
    more = [now - then for now, then in zip(mib(), before)]
    print(f"mapped {name}: rss {more[0]:.0f}, uss {more[1]:.0f}, pss {more[2]:.0f}")
    # What else the interpreter takes or gives back is far below an eighth of that.
    right &= all(abs(m / SIZE_MIB - e) < 0.125 for m, e in zip(more, expected))
sys.exit(not right)
END
