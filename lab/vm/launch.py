"""Start a QEMU and connect to it."""

import asyncio
import contextlib
import socket
import uuid
from collections.abc import AsyncIterator
from typing import TypeVar

from lab.errors import QmpError
from lab.guests.console import attached
from lab.guests.linux.build import find_guest
from lab.guests.micro import build as micro
from lab.host.process import QUIT_GRACE_S, running
from lab.host.running import NAME_PREFIX
from lab.host.workdir import private_folder
from lab.qemu.build import QemuBinary
from lab.scenario.machine import Machine
from lab.scenario.workload import Workload
from lab.vm.commandline import Channels, check_host, qemu_command
from lab.vm.devices import DeviceFiles
from lab.vm.loops import OwnTask
from lab.vm.qmp import connected
from lab.vm.vm import RunningVM

HEARTBEAT_S = 0.1
"""A notebook's interrupt takes effect when the event loop wakes next; a quiet one sleeps on."""


VMT = TypeVar("VMT", bound=RunningVM)


async def _heartbeat() -> None:
    while True:  # noqa: ASYNC110 - nothing is awaited here; the wake-ups themselves are the purpose
        await asyncio.sleep(HEARTBEAT_S)


def launched(
    kind: type[VMT],
    binary: QemuBinary,
    machine: Machine,
    workload: Workload,
    *,
    machine_type: str = "",
    incoming: bool = False,
    paused: bool = False,
) -> OwnTask[VMT]:
    """Start a QEMU and connect to it; see `OwnTask` for whose it is.

    :param kind: the class of what is connected to it.
    :raise LaunchError: when it dies first.
    """
    started = _started(
        kind,
        binary,
        machine,
        workload,
        machine_type=machine_type,
        incoming=incoming,
        paused=paused,
    )
    return OwnTask(started, "guest", lambda vm: vm.process.kill())


@contextlib.asynccontextmanager
async def _started(
    kind: type[VMT],
    binary: QemuBinary,
    machine: Machine,
    workload: Workload,
    *,
    machine_type: str = "",
    incoming: bool = False,
    paused: bool = False,
) -> AsyncIterator[VMT]:
    """Start a QEMU and connect to it.

    :raise LaunchError: when it dies first.
    """
    guest = micro.find_microguest() if machine.guest == "micro" else find_guest()
    await asyncio.to_thread(check_host, machine, binary.variant)
    name = f"{NAME_PREFIX}{uuid.uuid4()}"
    qmp_socket, qmp_child = socket.socketpair()
    serial_socket, serial_child = socket.socketpair()
    async with contextlib.AsyncExitStack() as stack:
        for sock in (qmp_socket, serial_socket, qmp_child, serial_child):
            stack.callback(sock.close)
        files = DeviceFiles(stack.enter_context(private_folder("lab-devices-")))
        if isinstance(guest, micro.Microguest):
            files.rom.write_bytes(micro.rom_for(guest.rom.read_bytes(), machine, workload))
        files.create(machine)
        command = qemu_command(
            binary.path,
            machine,
            workload,
            guest,
            Channels(qmp=qmp_child.fileno(), serial=serial_child.fileno()),
            files,
            name=name,
            machine_type=machine_type,
            incoming=incoming,
            paused=paused,
        )
        process = await stack.enter_async_context(
            running(command, pass_sockets=(qmp_child, serial_child), thp=machine.thp)
        )
        heart = asyncio.create_task(_heartbeat(), name="heartbeat")
        stack.callback(heart.cancel)
        console = await stack.enter_async_context(attached(serial_socket))
        try:
            qmp = await stack.enter_async_context(connected(qmp_socket))
        except QmpError as error:
            await process.wait(QUIT_GRACE_S)
            raise process.died("starting") from error
        vm = kind(
            process=process,
            qmp=qmp,
            console=console,
            machine=machine,
            workload=workload,
            binary=binary,
            guest=guest,
            files=files,
            name=name,
        )
        stack.push_async_callback(vm._quit)
        yield vm
