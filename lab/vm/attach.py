"""A VM that runs already, in a QEMU that the lab did not start and does not end.

What it is, is asked of its monitor and read in /proc.  A QEMU serves one client at a time on a
socket, so while the lab is attached the monitor is the lab's; afterwards the VM's migration is set
as it was before.
"""

import contextlib
import itertools
import logging
import os
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from lab.disks.chain import Layer, read_chain
from lab.disks.overlay import create_overlay
from lab.errors import LabError, SnapshotError, UsageError
from lab.guests.console import Console
from lab.guests.image.guest import UsersImage
from lab.host.process import Process
from lab.host.workdir import private_folder
from lab.qemu.build import QemuBinary
from lab.scenario.machine import Machine
from lab.scenario.workload import Workload
from lab.vm.argv import (
    CommandLine,
    DiskOption,
    device_ids,
    disks,
    read_command_line,
    require_restorable,
)
from lab.vm.commandline import Launch
from lab.vm.devices import DeviceFiles
from lab.vm.disks import DEFAULT_AIO, Disk, file_of
from lab.vm.guard import guarded
from lab.vm.launch import VMT
from lab.vm.loops import OwnTask
from lab.vm.peer import Peer, describe, find_process, put_back
from lab.vm.qmp import Qmp, connected

log = logging.getLogger(__name__)


class _Other:
    """A process that somebody else started."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._process = psutil.Process(pid)

    def poll(self) -> int | None:
        """0 when it has ended; with what, only its parent knows."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE:
                return None
        return 0

    def kill(self) -> None:
        """Do nothing: it is not the lab's to end."""


class AttachedProcess(Process):
    """A QEMU that the lab is attached to."""

    is_others = True


class BesideLayer:
    """A new layer beside the disk that it covers: a user's VM writes to it from then on."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def release(self) -> None:
        """Do nothing: the file is the user's."""

    def discard(self) -> None:
        """Remove it: nothing was written to it."""
        self.layer.path.unlink(missing_ok=True)


def attached(kind: type[VMT], path: Path) -> OwnTask[VMT]:
    """Attach to the QEMU that serves its monitor on the socket `path`; see `lab.session.attach`."""
    return OwnTask(_attached(kind, path), "attached guest", lambda vm: None)


@contextlib.asynccontextmanager
async def _attached(kind: type[VMT], path: Path) -> AsyncIterator[VMT]:
    async with contextlib.AsyncExitStack() as stack:
        monitor = _monitor(path)
        guard = stack.enter_context(guarded(monitor.fileno()))
        qmp = await stack.enter_async_context(connected(monitor))
        pid = await find_process(qmp)
        peer = await describe(qmp, pid)
        line = read_command_line(pid)
        _tell_what_is_not_restored(peer, line)
        folder = stack.enter_context(private_folder("lab-attached-"))
        binary = _binary(peer, line)
        found, problem = await _disks(qmp, line, binary.qemu_img)
        files = DeviceFiles(folder, found)
        machine = Machine(
            ram_mib=peer.ram_mib,
            vcpus=peer.vcpus,
            accel=peer.accel,
            guest="image",
            image=tuple(str(disk.layer.path) for disk in files.disks),
        )
        launch = Launch(
            binary=binary,
            machine=machine,
            workload=Workload("idle"),
            machine_type=peer.machine_type,
            line=line,
        )
        process = AttachedProcess(_Other(pid), [str(line.program), *line.arguments], folder)
        guest = UsersImage(kernel_version="", kernel_sha256="")
        vm = kind(launch, process=process, qmp=qmp, console=Console(), guest=guest, files=files)
        vm.machine_type = peer.machine_type
        vm.guard = guard
        vm.disk_problem = problem
        try:
            yield vm
        finally:
            if not qmp.is_lost:
                await put_back(qmp, peer.saved)


def _tell_what_is_not_restored(peer: Peer, line: CommandLine) -> None:
    """Warn of what its snapshots can be taken with, and not restored."""
    try:
        require_restorable(line)
    except UsageError as error:
        log.warning("a snapshot of this VM could not be restored: %s", error)
    if changed := sorted(peer.devices ^ device_ids(line)):
        log.warning(
            "a snapshot of this VM could not be restored: its devices are not those that it was "
            "started with (%s); start it with them",
            ", ".join(changed),
        )


def _monitor(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(str(path))
    except OSError as error:
        sock.close()
        raise UsageError(
            f"{path} cannot be connected to: {error.strerror}",
            "name the socket of a running QEMU's monitor, as -qmp unix:PATH,server=on,wait=off "
            "makes it",
        ) from error
    sock.setblocking(False)
    return sock


def _binary(peer: Peer, line: CommandLine) -> QemuBinary:
    return QemuBinary(
        path=line.program,
        variant="patched" if peer.patched else "unpatched",
        version=peer.version,
        build_id=peer.package or "not the lab's",
        series_sha256=None,
        sha256="",
    )


async def _disks(qmp: Qmp, line: CommandLine, qemu_img: Path) -> tuple[list[Disk], LabError | None]:
    """Return the disks that a VM writes to, and why they cannot be frozen, where they cannot.

    :raise UsageError: the command line cannot be understood.
    """
    named = [option for option in disks(line) if option.path is not None]
    found = []
    for block in await qmp.execute("query-block"):
        inserted = block.get("inserted")
        if inserted is None or inserted["ro"] or not (block.get("qdev") or block["device"]):
            continue
        try:
            found.append(await _disk(inserted, line.folder, named, qemu_img))
        except LabError as error:
            # A snapshot of the memory alone can be taken nevertheless.
            return [], error
    return found, None


async def _disk(
    inserted: dict[str, Any], folder: Path, named: Sequence[DiskOption], qemu_img: Path
) -> Disk:
    path = file_of(inserted, folder)
    if path is None:
        raise SnapshotError(
            f"the disk {inserted['file']} is no file, so no overlay has a place beside it",
            "detach it first, or take a snapshot of the memory alone with disks=False",
        )
    chain = await read_chain(qemu_img, path, format=inserted["drv"])
    # An earlier snapshot has put layers on the one that the VM was started with.
    started_with = next(
        (
            option
            for layer in chain
            for option in named
            if option.path is not None and option.path.exists() and option.path.samefile(layer.path)
        ),
        None,
    )
    if started_with is None:
        raise SnapshotError(
            f"the disk {path} is not on the VM's command line, so a restore could not find it",
            "take a snapshot of the memory alone with disks=False",
        )
    disk = Disk(
        node=inserted["node-name"],
        layer=chain[0],
        aio=started_with.aio or DEFAULT_AIO,
        named=started_with.path,
    )
    disk.note(inserted)
    return disk


async def layer_beside(base: Layer, snapshot: Path, qemu_img: Path) -> BesideLayer:
    """Make an empty layer on a VM's disk, beside it, named after both.

    :param snapshot: the image of the snapshot that needs it.
    """
    stem = f"{base.path.stem.partition('.')[0]}.{snapshot.stem}"
    for number in itertools.count(1):
        path = base.path.with_name(f"{stem}{'' if number == 1 else f'-{number}'}.qcow2")
        if not path.exists():
            break
    layer = await create_overlay(qemu_img, path, base)
    if os.geteuid() == 0:
        # Whoever may write to the disk has to be able to write to what covers it.
        status = base.path.stat()
        os.chown(path, status.st_uid, status.st_gid)
        path.chmod(status.st_mode & 0o777)
    return BesideLayer(layer)
