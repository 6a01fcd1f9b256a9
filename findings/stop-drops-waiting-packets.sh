#!/bin/sh
# Stopping a VM loses the packets that wait for its guest, and keeps those that come afterwards.
#
# One would guess: packets for a guest that is stopped wait until it runs again, whether they came
#   before it was stopped or while it was.
# What is so: those that come while it is stopped wait.  Those that QEMU had queued before, because
#   the guest had no room in its ring just then, are dropped when it is stopped.
# Seen with: QEMU 7.2 of Debian 12 (1:7.2+dfsg-7+deb12u18+b3), virtio-net with a dgram back end.
#   QEMU 10.0.13 has the same lines.
# Output seen: no stop: received
#              came while stopped: received
#              came before the stop: lost
# Why it matters: a pause of 2 ms gives requests of more than a second, because who sends with TCP
#   first tries again after 0.2 to 1 s, and nothing of it is in QEMU's own times.  Measure requests
#   from outside.  Patch 0071 of the lab's series repairs it.
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
import socket
import struct
import subprocess
import sys
import time

ROOM_S = 0.3  # The main loop needs microseconds to read a packet.
RING, BUFFER = 0x100000, 0x200000
AVAILABLE, USED = RING + 0x1000, RING + 0x2000


class Lines:
    """A socket that takes a line and answers with lines."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        for _ in range(100):
            try:
                self.socket.connect(path)
                break
            except OSError:
                time.sleep(0.1)
        self.file = self.socket.makefile("rw")

    def ask(self, line):
        self.file.write(line + "\n")
        self.file.flush()
        while True:
            said = self.file.readline()
            if not said:
                sys.exit("QEMU ended")
            if not said.startswith(("IRQ", '{"timestamp', '{"QMP')):
                return said


class Guest:
    """A virtio network card without a guest: the test device plays its driver."""

    def __init__(self, qtest):
        self.qtest = qtest
        base = 0xC000
        for register, value in ((0x10, base), (0x04, 7)):
            qtest.ask(f"outl 0xcf8 {0x80000000 | 4 << 11 | register:#x}")
            qtest.ask(f"outl 0xcfc {value:#x}")
        self.base = base
        qtest.ask(f"outb {base + 18:#x} 3")  # acknowledged, driver
        qtest.ask(f"outl {base + 4:#x} 0")  # no features
        qtest.ask(f"outw {base + 14:#x} 0")  # the receive queue
        qtest.ask(f"outl {base + 8:#x} {RING >> 12:#x}")
        qtest.ask(f"outb {base + 18:#x} 7")  # ready

    def give_room(self):
        descriptor = struct.pack("<QIHH", BUFFER, 2048, 2, 0)
        self.qtest.ask(f"write {RING:#x} 16 0x{descriptor.hex()}")
        self.qtest.ask(f"write {AVAILABLE:#x} 6 0x{struct.pack('<HHH', 0, 1, 0).hex()}")
        self.qtest.ask(f"outw {self.base + 16:#x} 0")

    def received(self):
        said = self.qtest.ask(f"read {USED + 2:#x} 2").split()[1]
        return struct.unpack("<H", bytes.fromhex(said[2:]))[0]


def case(binary, name, before, while_stopped, stop):
    command = [
        binary, "-machine", "pc,accel=tcg", "-nodefaults", "-display", "none", "-S",
        "-qtest", f"unix:{name}.qtest,server=on,wait=off", "-qtest-log", "none",
        "-qmp", f"unix:{name}.qmp,server=on,wait=off", "-bios", "halt",
        "-netdev", f"dgram,id=net,local.type=unix,local.path={name}.in,"
        f"remote.type=unix,remote.path={name}.out",
        "-device", "virtio-net-pci,netdev=net,disable-modern=on,addr=4,romfile=",
    ]
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sender.bind(f"{name}.out")
    packet = b"\xff" * 6 + b"\x52\x54\x00\x00\x00\x01" + b"\x08\x00" + bytes(50)
    qemu = subprocess.Popen(command)
    try:
        qmp = Lines(f"{name}.qmp")
        qmp.ask('{"execute": "qmp_capabilities"}')
        qmp.ask('{"execute": "cont"}')
        guest = Guest(Lines(f"{name}.qtest"))
        if before:
            sender.sendto(packet, f"{name}.in")
            time.sleep(ROOM_S)
        if stop:
            qmp.ask('{"execute": "stop"}')
            if while_stopped:
                sender.sendto(packet, f"{name}.in")
                time.sleep(ROOM_S)
            qmp.ask('{"execute": "cont"}')
        guest.give_room()
        time.sleep(ROOM_S)
        return "received" if guest.received() else "lost"
    finally:
        qemu.kill()
        qemu.wait()


# A processor that does nothing: all that its firmware holds is HLT.
with open("halt", "wb") as firmware:
    firmware.write(b"\xf4" * 65536)
version = subprocess.check_output([sys.argv[1], "--version"], text=True).splitlines()[0]
print(version, flush=True)
seen = []
for name, before, while_stopped, stop in (
    ("no stop", True, False, False),
    ("came while stopped", False, True, True),
    ("came before the stop", True, False, True),
):
    seen.append(case(sys.argv[1], name.replace(" ", "-"), before, while_stopped, stop))
    print(f"{name}: {seen[-1]}", flush=True)
sys.exit(seen != ["received", "received", "lost"])
END
