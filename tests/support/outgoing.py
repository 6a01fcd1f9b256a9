"""Something else than a file to migrate to: a socket whose reader the test is.

Nothing is read before it is asked for, so that QEMU stalls as soon as the kernel's buffer is full,
at a byte of the test's choice.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import TypeVar

from lab.session import VM
from tests.support.bench import PATIENCE_S, Channels, info, phases

T = TypeVar("T")

NAME = "outgoing"
#: Less than the device state is, together with what the kernel's smallest buffer holds.
PIECE_BYTES = 16 << 10


class Outgoing:
    """A socket that QEMU writes to, and what has been read from it."""

    def __init__(self, reader: socket.socket, writer: socket.socket) -> None:
        self._reader = reader
        # QEMU has a duplicate. This one is for setting the size of the buffer.
        self._writer = writer

    @property
    def channels(self) -> Channels:
        """The QMP form of a migration to this."""
        address = {"transport": "socket", "type": "fd", "str": NAME}
        return [{"channel-type": "main", "addr": address}]

    def fill(self) -> None:
        """Fill the kernel's buffer, so that not even the first byte of a stream is taken."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._writer.send(bytes(1 << 16), socket.MSG_DONTWAIT)

    async def read(self, size: int = PIECE_BYTES) -> bytes:
        """Read up to so many bytes; nothing when QEMU has closed its end."""
        async with asyncio.timeout(PATIENCE_S):
            return await asyncio.get_running_loop().sock_recv(self._reader, size)

    async def while_reading(self, work: Awaitable[T]) -> T:
        """Await `work`, and read a piece whenever it does not get on.

        A vCPU that waits for a page may hold QEMU's big lock, as it does when it delivers an
        interrupt, and then QEMU answers nobody until that page has been written.
        """
        task = asyncio.ensure_future(work)
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not (await asyncio.wait([task], timeout=0.05))[0]:
                    await self.read()
                return await task
        finally:
            task.cancel()

    async def until_complete_phase(self, vm: VM, expected_bytes: int) -> None:
        """Read until QEMU has written all memory and is about to write the device state.

        :param expected_bytes: how long the stream will be, give or take a MiB.
        """
        await self.read_exactly(expected_bytes - (2 << 20))
        self._writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        while "complete" not in phases(await self.while_reading(info(vm))):
            await self.read_exactly(PIECE_BYTES)

    async def read_exactly(self, size: int) -> None:
        """Read so many bytes."""
        while size > 0:
            size -= len(await self.read(size))

    async def drain(self, into: Path) -> None:
        """Read all there is until QEMU closes its end, into a file."""
        self._writer.close()
        with into.open("ab") as file:
            while data := await self.read(1 << 20):
                file.write(data)

    def close(self) -> None:
        """Close this end, as a reader does that dies."""
        self._reader.close()


@contextlib.asynccontextmanager
async def outgoing(vm: VM) -> AsyncIterator[Outgoing]:
    """Give a socket for one migration of `vm`."""
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        vm.qmp._client.send_fd_scm(writer.fileno())
        await vm.execute("getfd", {"fdname": NAME})
        yield Outgoing(reader, writer)
