"""Whether there is room for an image."""

import contextlib
from pathlib import Path

from lab.errors import SnapshotError
from lab.host.limits import process_limit
from lab.host.room import room_bytes
from lab.host.room import said as room_said
from lab.scenario.methods import Method
from lab.snapshot.mechanisms import mechanism_of
from lab.vm.ram import QEMU_OVERHEAD_MIB
from lab.vm.vm import RunningVM

FSIZE_REMEDY = "boot the guest under a higher limit, such as `ulimit -f unlimited`"
QEMU_STATE_BYTES = 64 << 20
"""Room on the disk for what is in an image besides pages: headers and the devices' state."""


def check_disk(vm: RunningVM, how: Method, image: Path) -> None:
    """Refuse a snapshot for which there is clearly no room; a disk that fills up later fails it."""
    guest_bytes = vm.machine.ram_mib << 20
    # Pages that were never written are not in the image, and not resident in QEMU either.
    resident = min(guest_bytes, resident_bytes(vm.pid))
    expected = mechanism_of(how, vm.binary.variant).expected_bytes(resident) + QEMU_STATE_BYTES
    room = room_bytes(image.parent)
    if room < expected:
        raise SnapshotError(
            f"the image needs about {expected >> 20} MiB and {room_said(room)} in {image.parent}",
            "free some disk space or choose another path",
        )
    limit = process_limit("FSIZE", vm.pid)
    if limit is None:
        return
    # The least that it can be: what QEMU has besides guest RAM is not in it, and where each page
    # has its place, the last one's is beyond all others.
    least = max(resident - (QEMU_OVERHEAD_MIB << 20), 0)
    if how.has_places:
        least = guest_bytes
    if limit < least:
        raise SnapshotError(
            f"the image needs {least >> 20} MiB or more and a file of QEMU's may have "
            f"{limit >> 20} MiB (RLIMIT_FSIZE)",
            FSIZE_REMEDY,
        )


def resident_bytes(pid: int) -> int:
    """Return how much memory a process has, of whatever kind; 0 when it has ended."""
    total_kib = 0
    # No file, or none of the lines: the process has just ended, and the next command tells why.
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            # Guest RAM is one of the four, according to its kind.
            if line.startswith(("RssAnon:", "RssShmem:", "RssFile:", "HugetlbPages:")):
                total_kib += int(line.split()[1])
    return total_kib * 1024
