#!/bin/sh
# An overlay that is put on a running VM's disk does not turn zeros into holes any more.
#
# One would guess: blockdev-snapshot-sync opens the overlay as the disk below it was opened.
# What is so: it keeps how the cache is used, and that what the guest discards is given back
#   (discard=unmap), but not detect-zeroes=unmap: that is off from the first snapshot on.
# Seen with: QEMU 7.2 of Debian 12 (1:7.2+dfsg-7+deb12u18+b3); QEMU 10.0.13 does the same.
# Output seen: before the snapshot: detect-zeroes=unmap, cache.no-flush=True
#              after it:            detect-zeroes=off, cache.no-flush=True
#              4 MiB written and discarded: 4 MiB given back
#              4 MiB of zeros written:      0 MiB given back
# Why it matters: a disk that was thin, because its guest fills free space with zeros, grows to its
#   full size after a snapshot, and no command reports that anything has changed.  Who adds overlays
#   with blockdev-add names it there, as the lab does.
#
# Needs: Debian 12 on amd64 with current package lists (apt-get download), Python 3.  QEMU's
# libraries that are not here come the same way.  No root.

set -eu
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
trap 'exit 1' HUP INT TERM
cd "$work"
apt-get download -q \
    qemu-system-x86=1:7.2+dfsg-7+deb12u18+b3 qemu-system-common=1:7.2+dfsg-7+deb12u18+b3 \
    libslirp0=4.7.0-1 liburing2=2.3-3 \
    libcapstone4=4.0.2-5 libdaxctl1=76.1-1 libfdt1=1.6.1-4+b1 libibverbs1=44.0-2 \
    libndctl6=76.1-1 libnl-3-200=3.7.0-0.2+b1 libnl-route-3-200=3.7.0-0.2+b1 \
    libpmem1=1.12.1-2 librdmacm1=44.0-2 libvdeplug2=4.0.1-4 > apt 2>&1 \
    || { cat apt >&2; exit 1; }
for package in *.deb; do
    dpkg -x "$package" tree
done
export LD_LIBRARY_PATH="$work/tree/usr/lib/x86_64-linux-gnu:$work/tree/lib/x86_64-linux-gnu"

python3 - tree/usr/bin/qemu-system-x86_64 << 'END'
import json
import os
import socket
import subprocess
import sys
import time

MIB = 1 << 20
with open("disk", "wb") as disk:
    disk.truncate(16 * MIB)
qemu = sys.argv[1]
print(subprocess.run([qemu, "--version"], capture_output=True, text=True).stdout.splitlines()[0])
options = "cache=unsafe,discard=unmap,detect-zeroes=unmap"
running = subprocess.Popen(
    [qemu, "-machine", "none", "-nodefaults", "-display", "none", "-S"]
    + ["-qmp", "unix:monitor,server=on,wait=off"]
    + ["-drive", f"if=none,id=disk,file=disk,format=raw,{options}"]
)
try:
    monitor = socket.socket(socket.AF_UNIX)
    for _ in range(100):
        try:
            monitor.connect("monitor")
            break
        except OSError:
            time.sleep(0.1)
    monitor.settimeout(20)
    file = monitor.makefile("rw")
    file.readline()

    def ask(command, **arguments):
        file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        file.flush()
        while True:
            told = json.loads(file.readline())
            if "error" in told:
                sys.exit(f"{command}: {told['error']['desc']}")
            if "return" in told:
                return told["return"]

    def opened():
        (disk,) = ask("query-block")
        return disk["inserted"]["detect_zeroes"], disk["inserted"]["cache"]["no-flush"]

    def do(what):
        ask("human-monitor-command", **{"command-line": f'qemu-io disk "{what}"'})

    def occupied():
        return os.stat("overlay").st_blocks * 512

    ask("qmp_capabilities")
    before = opened()
    ask("blockdev-snapshot-sync", device="disk", format="qcow2", **{"snapshot-file": "overlay"})
    after = opened()
    do("write -q -P 1 0 4M")
    full = occupied()
    do("discard -q 0 4M")
    given_back = (full - occupied()) // MIB
    start = occupied()
    do("write -q -P 0 8M 4M")
    zeros_kept = (occupied() - start) // MIB
    ask("quit")
finally:
    if running.poll() is None:
        try:
            running.wait(10)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()

print(f"before the snapshot: detect-zeroes={before[0]}, cache.no-flush={before[1]}")
print(f"after it:            detect-zeroes={after[0]}, cache.no-flush={after[1]}")
print(f"4 MiB written and discarded: {given_back} MiB given back")
print(f"4 MiB of zeros written:      {4 - zeros_kept} MiB given back")
if (before, after) != (("unmap", True), ("off", True)) or (given_back, zeros_kept) != (4, 4):
    sys.exit("this is not what was seen before")
END
