"""Start a QEMU and connect to it."""

import asyncio
import contextlib
import socket
import uuid
from collections.abc import AsyncIterator
from typing import TypeVar

from lab.errors import QmpError
from lab.guests.console import attached
from lab.guests.image.guest import users_image
from lab.guests.registry import GUESTS
from lab.host.process import QUIT_GRACE_S, running
from lab.host.running import NAME_PREFIX
from lab.host.workdir import private_folder
from lab.vm.commandline import Channels, Launch, check_host, foreign_command, qemu_command
from lab.vm.devices import DeviceFiles, free_ports
from lab.vm.layers import find_nodes, own_layers
from lab.vm.loops import OwnTask
from lab.vm.qmp import connected
from lab.vm.vm import RunningVM

HEARTBEAT_S = 0.1
"""A notebook's interrupt takes effect when the event loop wakes next; a quiet one sleeps on."""


VMT = TypeVar("VMT", bound=RunningVM)


async def _heartbeat() -> None:
    while True:  # noqa: ASYNC110 - nothing is awaited here; the wake-ups themselves are the purpose
        await asyncio.sleep(HEARTBEAT_S)


def launched(kind: type[VMT], launch: Launch) -> OwnTask[VMT]:
    """Start a QEMU and connect to it; see `OwnTask` for whose it is.

    :param kind: the class of what is connected to it.
    :raise LaunchError: when it dies first.
    """
    return OwnTask(_started(kind, launch), "guest", lambda vm: vm.process.kill())


@contextlib.asynccontextmanager
async def _started(kind: type[VMT], launch: Launch) -> AsyncIterator[VMT]:
    machine = launch.machine
    guest = users_image(machine) if machine.is_users else GUESTS[machine.guest].find()
    await asyncio.to_thread(check_host, machine, launch.binary.variant)
    name = f"{NAME_PREFIX}{uuid.uuid4()}"
    qmp_socket, qmp_child = socket.socketpair()
    serial_socket, serial_child = socket.socketpair()
    async with contextlib.AsyncExitStack() as stack:
        for sock in (qmp_socket, serial_socket, qmp_child, serial_child):
            stack.callback(sock.close)
        folder = stack.enter_context(private_folder("lab-devices-"))
        disks = await stack.enter_async_context(own_layers(launch))
        files = DeviceFiles(folder, disks, free_ports(machine.forward))
        guest.write_firmware(files.firmware, machine, launch.workload)
        files.create(machine)
        channels = Channels(qmp=qmp_child.fileno(), serial=serial_child.fileno())
        if launch.line is None:
            command, cwd = qemu_command(launch, guest, channels, files, name=name), None
        else:
            command, cwd = foreign_command(launch, channels, files, name=name), launch.line.folder
        process = await stack.enter_async_context(
            running(command, pass_sockets=(qmp_child, serial_child), thp=machine.thp, folder=cwd)
        )
        heart = asyncio.create_task(_heartbeat(), name="heartbeat")
        stack.callback(heart.cancel)
        console = await stack.enter_async_context(attached(serial_socket))
        try:
            qmp = await stack.enter_async_context(connected(qmp_socket))
        except QmpError as error:
            await process.wait(QUIT_GRACE_S)
            raise process.died("starting") from error
        vm = kind(launch, process=process, qmp=qmp, console=console, guest=guest, files=files)
        stack.push_async_callback(vm.quit)
        if launch.line is not None:
            await find_nodes(vm)
        yield vm
