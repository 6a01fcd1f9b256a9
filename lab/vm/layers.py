"""The layers of a VM that the lab starts: fresh ones on what its disks go on from."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from lab.disks.chain import read_chain, require_unlocked
from lab.disks.store import Store
from lab.errors import QmpError
from lab.vm.argv import CommandLine
from lab.vm.argv import disks as disks_of
from lab.vm.commandline import Launch
from lab.vm.disks import DEFAULT_AIO, Disk, file_of
from lab.vm.vm import RunningVM


@contextlib.asynccontextmanager
async def own_layers(launch: Launch) -> AsyncIterator[list[Disk]]:
    """Give each disk of a user's machine a fresh layer, and let go of all that it used at the end.

    :raise UsageError: an image cannot be used.
    """
    machine, bases = launch.machine, launch.bases
    if launch.line is None and not bases:
        bases = tuple(map(Path, machine.image))
    if not bases:
        yield []
        return
    qemu_img = launch.binary.qemu_img
    store = Store.default()
    await store.collect(qemu_img)
    disks: list[Disk] = []
    try:
        for number, base in enumerate(bases):
            if not launch.bases:
                await require_unlocked(qemu_img, base)
            chain = await read_chain(qemu_img, base)
            held = await store.new_layer(qemu_img, chain[0])
            named = launch.named[number] if launch.named else None
            disks.append(
                Disk(
                    node=f"disk{number}",
                    layer=held.layer,
                    direct=machine.disk_cache == "none",
                    aio=machine.disk_aio if launch.line is None else _aio(launch.line, named),
                    named=named,
                    held=[held],
                )
            )
        yield disks
    finally:
        for disk in disks:
            for layer in disk.held:
                layer.release()
        await store.collect(qemu_img)


def _aio(line: CommandLine, named: Path | None) -> str:
    """Who does the I/O of a disk on a command line that is not the lab's."""
    return next((one.aio for one in disks_of(line) if one.path == named and one.aio), DEFAULT_AIO)


async def find_nodes(vm: RunningVM) -> None:
    """Find out what QEMU calls the disks of a VM whose command line is not the lab's, and how it
    has opened them.

    :raise QmpError: when one is not there.
    """
    blocks = [block["inserted"] for block in await vm.execute("query-block") if "inserted" in block]
    tops = {file_of(inserted, Path("/")): inserted for inserted in blocks}
    for disk in vm.files.disks:
        if disk.layer.path not in tops:
            raise QmpError(f"QEMU does not have the disk {disk.layer.path} open")
        disk.note(tops[disk.layer.path])
