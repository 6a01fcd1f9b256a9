#!/bin/sh
# A port that QEMU's user network forwards queues two connections, and not the usual hundreds.
#
# One would guess: a forwarded port takes a burst of connections as the server behind it would:
#   they wait in the listening socket's queue, which servers ask to be 128 or more.
# What is so: libslirp listens with a backlog of 1.  Of connections that come while QEMU's main
#   loop is busy the kernel takes two; the others are not refused: their SYN is dropped, and they
#   wait for TCP's retransmission, a second, then two, four and so on.
# Seen with: QEMU 7.2 of Debian 12 (1:7.2+dfsg-7+deb12u18+b3), libslirp 4.7.0-1.
# Output seen: forwarded by QEMU: 2 of 20 connected
#              a listener of its own: 20 of 20 connected
# Why it matters: a load generator that opens its 50 connections at once measures the first seconds
#   of TCP's back-off, or hangs for minutes under load.  Open them one after the other.
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
    libslirp0=4.7.0-1 \
    libcapstone4=4.0.2-5 libdaxctl1=76.1-1 libfdt1=1.6.1-4+b1 libibverbs1=44.0-2 \
    libndctl6=76.1-1 libnl-3-200=3.7.0-0.2+b1 libnl-route-3-200=3.7.0-0.2+b1 \
    libpmem1=1.12.1-2 librdmacm1=44.0-2 libvdeplug2=4.0.1-4 > apt 2>&1 \
    || { cat apt >&2; exit 1; }
for package in *.deb; do
    dpkg -x "$package" tree
done
export LD_LIBRARY_PATH="$work/tree/usr/lib/x86_64-linux-gnu:$work/tree/lib/x86_64-linux-gnu"

python3 - tree/usr/bin/qemu-system-x86_64 << 'END'
import os
import select
import signal
import socket
import subprocess
import sys
import time

MANY = 20
WAIT_S = 0.5  # Less than the second after which TCP tries again.


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def connected(port):
    """How many of connections that begin together are taken within the time."""
    begun = []
    for _ in range(MANY):
        one = socket.socket()
        one.setblocking(False)
        one.connect_ex(("127.0.0.1", port))
        begun.append(one)
    time.sleep(WAIT_S)
    _, ready, _ = select.select([], begun, [], 0)
    taken = sum(one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0 for one in ready)
    for one in begun:
        one.close()
    return taken


def listens(port):
    with open("/proc/net/tcp") as table:
        return any(f":{port:04X} 00000000:0000 0A" in line for line in table)


print(subprocess.check_output([sys.argv[1], "--version"], text=True).splitlines()[0], flush=True)
port = free_port()
qemu = subprocess.Popen(
    [sys.argv[1], "-machine", "none", "-m", "8", "-nodefaults", "-display", "none", "-S"]
    + ["-netdev", f"user,id=n,hostfwd=tcp:127.0.0.1:{port}-:80"],
    stderr=subprocess.DEVNULL,
)
try:
    while not listens(port):
        if qemu.poll() is not None:
            raise SystemExit("QEMU has ended")
        time.sleep(0.02)
    # A main loop that is busy for a while.
    os.kill(qemu.pid, signal.SIGSTOP)
    forwarded = connected(port)
finally:
    qemu.kill()
    qemu.wait()
with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    own = connected(listener.getsockname()[1])
print(f"forwarded by QEMU: {forwarded} of {MANY} connected")
print(f"a listener of its own: {own} of {MANY} connected")
sys.exit((forwarded, own) != (2, MANY))
END
