"""The guest that stamps: a kernel, `stamps.c` as its only program, and its disks.

It is a machine with images, as a user's: no workload of the lab's, and its disks are what a
snapshot freezes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lab.disks.qemu_img import run_qemu_img
from lab.errors import HostError, UsageError
from lab.guests.linux.initramfs import Program, archive_path, build_archive
from lab.guests.linux.kernel import find_kernel
from lab.guests.protocol import KERNEL_PARAMETERS
from lab.scenario.machine import DiskCache, DiskKind, Machine
from lab.scenario.methods import METHODS, Variant
from lab.scenario.methods import method as method_of
from lab.verify.stamps.check import MAX_DISKS

DISK_MIB = 64
RAM_MIB = 128

ImageFormat = Literal["raw", "qcow2"]

_PROGRAM = Program("stamps", (Path(__file__).with_name("stamps.c"),))


@dataclass(frozen=True, kw_only=True)
class Case:
    """What guest, what disks, and how a snapshot is taken.

    :param method: one of `lab.METHODS`.
    :param disks: how many, 1 to 4.
    :param disk: `virtio`, `ide` or `scsi`.
    :param iothread: a thread of its own serves them; not `ide`, and not on the unpatched QEMU,
        whose guest would hang sooner or later when it is stopped (patch 0023).
    :param cache: as in `Machine.disk_cache`.
    :param image_format: of the images below the overlays.
    :param cached: the guest writes through its page cache.
    :param sync_every: rounds between two calls of fdatasync, 0 for none.
    """

    method: str = "live"
    disks: int = 1
    disk: DiskKind = "virtio"
    iothread: bool = False
    cache: DiskCache = "writeback"
    image_format: ImageFormat = "raw"
    cached: bool = False
    sync_every: int = 0

    def __post_init__(self) -> None:
        method_of(self.method)  # raises for one that does not exist
        if not 1 <= self.disks <= MAX_DISKS:
            raise UsageError(f"{self.disks} disks", f"choose 1 to {MAX_DISKS}")
        if self.disk == "none":
            raise UsageError("no disk to write to", "choose virtio, ide or scsi")
        if self.cached and not self.sync_every:
            raise UsageError(
                "through the guest's page cache nothing is known without fsync", "set sync_every"
            )
        if self.iothread and not METHODS[self.method].runs_on("patched"):
            raise UsageError(
                f"{self.method} needs the unpatched QEMU, on which a guest with an I/O thread may "
                "hang when it is stopped",
                "do without an I/O thread",
            )

    @property
    def variant(self) -> Variant:
        """The QEMU that it runs on."""
        return "patched" if self.iothread else METHODS[self.method].preferred_variant


async def ensure_initramfs() -> Path:
    """Return the guest's initramfs, compiled if it is not in the cache.

    :raise HostError: there is no kernel yet, or no compiler.
    """
    kernel = find_kernel()
    if kernel is None:
        raise HostError("the guest's kernel is not in the cache", "run `lab build`")
    drivers = kernel.read_modules()
    archive = archive_path(drivers, _PROGRAM)
    if not archive.is_file():
        await build_archive(drivers, archive, _PROGRAM)
    return archive


async def make_images(case: Case, qemu_img: Path, folder: Path) -> tuple[Path, ...]:
    """Make the empty disks of a case in a folder, in place of those that are there."""
    images = []
    for number in range(case.disks):
        image = folder / f"disk{number}.{case.image_format}"
        image.unlink(missing_ok=True)
        size = f"{DISK_MIB}M"
        done = await run_qemu_img(qemu_img, "create", "-q", "-f", case.image_format, image, size)
        if done.status:
            raise HostError(f"{image} cannot be made: {done.said}", "free some disk space")
        images.append(image)
    return tuple(images)


async def stamping_machine(case: Case, images: tuple[Path, ...]) -> Machine:
    """Return the machine that stamps these images."""
    kernel = find_kernel()
    initramfs = await ensure_initramfs()
    assert kernel is not None
    append = (
        *KERNEL_PARAMETERS,
        f"stamps.disks={case.disks}",
        f"stamps.kind={case.disk}",
        f"stamps.cached={int(case.cached)}",
        f"stamps.sync_every={case.sync_every}",
    )
    return Machine(
        ram_mib=RAM_MIB,
        image=tuple(map(str, images)),
        disk=case.disk,
        disk_cache=case.cache,
        disk_iothread=case.iothread,
        kernel=str(kernel.path),
        initrd=str(initramfs),
        append=" ".join(append),
    )
