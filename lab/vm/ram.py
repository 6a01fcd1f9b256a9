"""What backs the guest's RAM: QEMU's arguments for each kind, and what the host has to have for it.

`anon`
    anonymous memory of the QEMU process, which is QEMU's own default.
`memfd`, `memfd-private`
    a memfd, mapped shared or private.  Private, a page belongs to the process once it is written.
`file`, `file-private`
    a file without a name in `LAB_RAM_DIR` (by default /dev/shm), mapped shared or private.  It
    goes with QEMU, however that ends.  Only on a tmpfs can it be write-protected, that is,
    snapshotted live.
`hugetlb`
    reserved huge pages of 2 MiB, shared, which are protected, saved and released as a whole.

The RAM block is called `pc.ram` in every kind, so an image does not depend on the kind it was
taken of.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from lab.errors import HostError
from lab.host.info import thp_settings
from lab.host.limits import LimitName, require_limit
from lab.host.needs import require_huge_pages, require_memory
from lab.host.room import require_room
from lab.scenario.machine import HUGE_PAGE_MIB, Machine, RamKind
from lab.scenario.methods import Variant

DEFAULT_RAM_DIR = Path("/dev/shm")

QEMU_OVERHEAD_MIB = 96
"""What QEMU needs besides guest RAM: its code, translated blocks and thread stacks."""

_ADDRESS_LIMITS: tuple[LimitName, ...] = ("AS", "DATA")

_BLOCK_NAME = "pc.ram"


def ram_dir() -> Path:
    """Return the folder for RAM of the `file` kinds: ``$LAB_RAM_DIR``, or /dev/shm."""
    return Path(os.environ.get("LAB_RAM_DIR") or DEFAULT_RAM_DIR).absolute()


def machine_option(machine: Machine) -> str:
    """Return what QEMU's `-M` needs besides the machine's type."""
    # QEMU would offer guest RAM to the kernel for merging, which takes write protection off it.
    backend = "" if machine.ram_kind == "anon" else f",memory-backend={_BLOCK_NAME}"
    return f",mem-merge=off{backend}"


def ram_arguments(machine: Machine) -> list[str]:
    """Return QEMU's arguments for the guest's RAM."""
    size = ["-m", f"{machine.ram_mib}M"]
    if machine.ram_kind == "anon":
        return size
    kind, _, private = machine.ram_kind.partition("-")
    # Without the canonical path the block is called as it would be without a backend.
    common = f"id={_BLOCK_NAME},x-use-canonical-path-for-ramblock-id=off,size={machine.ram_mib}M"
    common += f",share={'off' if private else 'on'}"
    if kind == "file":
        # In a folder QEMU makes a file and unlinks it at once.  A comma is written twice.
        path = str(ram_dir()).replace(",", ",,")
        return [*size, "-object", f"memory-backend-file,{common},mem-path={path}"]
    huge = f",hugetlb=on,hugetlbsize={HUGE_PAGE_MIB}M" if kind == "hugetlb" else ""
    return [*size, "-object", f"memory-backend-memfd,{common}{huge}"]


@dataclass(frozen=True)
class Mount:
    """A file system in its place: its type, and the options it is mounted with."""

    type: str
    options: tuple[str, ...]

    @property
    def permits_huge_pages(self) -> bool:
        """Whether files there can have transparent huge pages: only those of a tmpfs can."""
        huge = {f"huge={choice}" for choice in ("always", "within_size", "advise")}
        return self.type == "tmpfs" and not huge.isdisjoint(self.options)


def mount_of(path: Path) -> Mount | None:
    """Return the file system that holds `path`, or None when the system does not tell."""
    resolved = path.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if resolved.is_relative_to(m.mountpoint)]
    if not mounts:
        return None
    # Of several mounts on one place the last one is seen.
    _, found = max(enumerate(mounts), key=lambda m: (len(m[1].mountpoint), m[0]))
    return Mount(found.fstype, tuple(found.opts.split(",")))


def require_ram(machine: Machine, variant: Variant = "patched") -> None:
    """Refuse a machine whose RAM this host does not have.

    :param variant: the QEMU that is to run it.
    :raise HostError: when memory, huge pages or room in `LAB_RAM_DIR` are missing, a limit of this
        process forbids so much of it, or transparent huge pages are asked for and cannot arise in
        this kind of memory.
    """
    what = f"{machine.ram_mib} MiB of guest RAM"
    kind, _, private = machine.ram_kind.partition("-")
    if kind == "hugetlb":
        require_memory(QEMU_OVERHEAD_MIB, "QEMU without its guest's RAM")
        require_huge_pages(machine.ram_mib, what)
    else:
        # A private page is there twice: as it was read from the file, and as it was written.
        copies = 2 if private else 1
        require_memory(machine.ram_mib * copies + QEMU_OVERHEAD_MIB, what)
    if kind in ("memfd", "file", "hugetlb"):
        require_limit("FSIZE", machine.ram_mib << 20, f"{what} of kind {machine.ram_kind}")
    if kind == "file":
        remedy = "make room, or set LAB_RAM_DIR to a folder on a larger tmpfs"
        require_room(ram_dir(), machine.ram_mib << 20, what, remedy)
    # Both count addresses, not memory in use, of which QEMU has more.
    for name in _ADDRESS_LIMITS:
        require_limit(name, machine.ram_mib + QEMU_OVERHEAD_MIB << 20, what)
    if machine.thp:
        require_thp(machine.ram_kind, variant)


def require_thp(ram_kind: RamKind, variant: Variant = "patched") -> None:
    """Refuse transparent huge pages in a kind of RAM in which they cannot arise.

    :raise HostError: naming why not.
    """
    kind, _, private = ram_kind.partition("-")
    if private:
        raise HostError(
            f"RAM of the kind {ram_kind} cannot have transparent huge pages: the kernel copies it "
            "page by page as it is written",
            f"use ram_kind {kind}, or leave thp unset",
        )
    if kind != "anon" and variant == "unpatched":
        raise HostError(
            f"RAM of the kind {ram_kind} cannot have transparent huge pages in the unpatched "
            "QEMU, which does not begin it at a multiple of 2 MiB",
            "use the patched QEMU, or leave thp unset",
        )
    if kind == "anon":
        _require_setting("enabled", "madvise")
    elif kind == "memfd" or thp_settings().get("shmem_enabled") in ("force", "deny"):
        _require_setting("shmem_enabled", "advise")
    else:
        # That setting is for memory without a mount; a mount has an option of its own.
        _require_mount_option()


def _require_setting(setting: str, choice: str) -> None:
    if thp_settings().get(setting, "never") in ("never", "deny"):
        raise HostError(
            "transparent huge pages are switched off on this host",
            f"write {choice} to /sys/kernel/mm/transparent_hugepage/{setting}, or leave thp unset",
        )


def _require_mount_option() -> None:
    mount = mount_of(ram_dir())
    if mount is None or not mount.permits_huge_pages:
        raise HostError(
            f"transparent huge pages are switched off for files in {ram_dir()}",
            "set LAB_RAM_DIR to a folder on a tmpfs that is mounted with huge=advise, or leave thp "
            "unset",
        )
