"""The disks of a user's VM: the layer that each is written to, and QEMU's description of it."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.disks.chain import Layer, read_chain, require_unlocked
from lab.disks.store import HeldLayer, Store
from lab.scenario.machine import Machine


@dataclass
class Disk:
    """A disk of a running VM.

    :param node: the name of the block node that is its top.
    :param layer: the file that the guest writes to now.
    :param direct: whether it is read and written past the host's page cache.
    :param aio: who does its I/O, as QEMU calls that.
    :param held: the layers that the lab keeps for as long as the VM runs, oldest first.
    """

    node: str
    layer: Layer
    direct: bool
    aio: str
    held: list[HeldLayer] = field(default_factory=list)


def blockdev(disk_node: str, path: Path, *, direct: bool, aio: str) -> dict[str, Any]:
    """Return what QEMU is told of a qcow2 layer, as `-blockdev` and `blockdev-add` have it."""
    return {
        "driver": "qcow2",
        "node-name": disk_node,
        "discard": "unmap",
        "cache": {"direct": direct},
        "file": {
            "driver": "file",
            "filename": str(path),
            "aio": aio,
            "discard": "unmap",
            "cache": {"direct": direct},
        },
    }


@contextlib.asynccontextmanager
async def own_layers(
    machine: Machine, qemu_img: Path, bases: Sequence[Path]
) -> AsyncIterator[list[Disk]]:
    """Give each disk of a user's machine a fresh layer, and let go of all that it used at the end.

    :param bases: what the layers are put on; none: the machine's images.
    :raise UsageError: an image cannot be used.
    """
    if not (bases or machine.image):
        yield []
        return
    store = Store.default()
    await store.collect(qemu_img)
    disks: list[Disk] = []
    try:
        for number, base in enumerate(bases or map(Path, machine.image)):
            if not bases:
                await require_unlocked(qemu_img, base)
            chain = await read_chain(qemu_img, base)
            held = await store.new_layer(qemu_img, chain[0])
            disks.append(
                Disk(
                    node=f"disk{number}",
                    layer=held.layer,
                    direct=machine.disk_cache == "none",
                    aio=machine.disk_aio,
                    held=[held],
                )
            )
        yield disks
    finally:
        for disk in disks:
            for held in disk.held:
                held.release()
        await store.collect(qemu_img)
