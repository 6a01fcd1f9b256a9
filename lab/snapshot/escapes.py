"""Find what writes to guest memory without QEMU noticing, and so without a live snapshot noticing.

A live snapshot protects memory in the page tables of the QEMU process.  A process that has guest
memory mapped as well, and a device that it is pinned for, write past them: the image would have
later content in some pages, and be called complete.  The patched QEMU refuses such a snapshot
itself.  The unpatched one does not, so the lab asks it what it has, and looks at who has mapped the
same memory.

What cannot be seen: a process of another user, where this one is not root's; who maps the memory
later; a device that was built into QEMU after its version 10.0.
"""

import re
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import NamedTuple

from lab.errors import SnapshotError
from lab.vm.vm import RunningVM

PINNING_DRIVERS = frozenset(
    (
        "nvme",
        # libblkio's
        "io_uring",
        "nvme-io_uring",
        "virtio-blk-vfio-pci",
        "virtio-blk-vhost-user",
        "virtio-blk-vhost-vdpa",
    )
)
"""Block drivers that guest memory is registered with.  `io_uring` is one of libblkio's, and not
the way to do I/O that other drivers have, of the same name."""

_CONTAINERS = ("/machine/peripheral", "/machine/peripheral-anon", "/objects")
_WRITER = re.compile(
    r"child<(?P<kind>(?P<outside>(?:cryptodev-)?vhost-(?:user|vdpa))[^>]*|ivshmem-[^>]*)>"
)
_NETDEV = re.compile(r"^[\s\\]*(\S+): index=\d+,type=(vhost-user|vhost-vdpa)\b", re.M)


async def require_none(vm: "RunningVM", method: str) -> None:
    """Refuse a live snapshot if something writes to the guest's memory unnoticed.

    :param method: what the snapshot is called.
    :raise SnapshotError: naming the writer.
    """
    async for writer in _writers(vm):
        raise SnapshotError(
            f"{method} would not notice what {writer} writes to guest memory",
            "boot without it, or take the snapshot with migrate-to-file or stop-and-copy",
        )


async def _writers(vm: "RunningVM") -> AsyncIterator[str]:
    for container in _CONTAINERS:
        for child in await vm.execute("qom-list", {"path": container}):
            name = str(child["name"])
            match = _WRITER.fullmatch(str(child["type"]))
            if match and (match["outside"] or await _is_shared(vm, container, name)):
                yield f"the device {name} ({match['kind']})"
    for name, kind in _NETDEV.findall((await vm.hmp("info network")).replace("\r", "")):
        yield f"the network {name} ({kind})"
    for node in await vm.execute("query-named-block-nodes", {"flat": True}):
        if node["drv"] in PINNING_DRIVERS:
            yield f"the drive {node['node-name']} ({node['drv']})"
    addresses = [block.host_address for block in await vm.ram_blocks()]
    if not all(addresses):
        raise SnapshotError(
            f"QEMU {vm.binary.version} does not say where its memory is, so nobody can tell "
            "whether another process writes to it",
            "take the snapshot with migrate-to-file or stop-and-copy, or run QEMU 8.0 or newer",
        )
    for pid in processes_that_share(vm.pid, addresses):
        yield f"process {pid}"


async def _is_shared(vm: "RunningVM", container: str, name: str) -> bool:
    """Whether others see what is written to the memory of an ivshmem device."""
    device = f"{container}/{name}"
    properties = {each["name"] for each in await vm.execute("qom-list", {"path": device})}
    if "memdev" not in properties:
        return True  # its memory is a server's
    backend = await vm.execute("qom-get", {"path": device, "property": "memdev"})
    return bool(await vm.execute("qom-get", {"path": backend, "property": "share"}))


def processes_that_share(pid: int, addresses: Collection[int]) -> list[int]:
    """Return the other processes that may write to memory that the process `pid` shares.

    Only those whose mappings this process may read.

    :param addresses: where the memory is mapped in that process.
    """
    own = {
        mapping.file
        for mapping in _shared_mappings(pid)
        if any(mapping.start <= address < mapping.end for address in addresses)
    }
    if not own:
        return []
    others = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
    return [
        other
        for other in sorted(others)
        if other != pid and any(mapping.file in own for mapping in _shared_mappings(other))
    ]


class _Mapping(NamedTuple):
    start: int
    end: int
    file: bytes
    """Device and inode."""


def _shared_mappings(pid: int) -> list[_Mapping]:
    """What a process has mapped shared and writable; nothing if that is kept from this one."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_bytes().splitlines()
    except OSError:  # it is another user's, or has ended
        return []
    found = []
    for line in lines:
        # The name, which may be any bytes, is last.
        where, permissions, _, device, inode, *_ = line.split(None, 5)
        if permissions[1:2] == b"w" and permissions[3:4] == b"s":
            start, _, end = where.partition(b"-")
            found.append(_Mapping(int(start, 16), int(end, 16), device + b" " + inode))
    return found
