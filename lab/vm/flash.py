"""Write to a guest's flash from inside of QEMU, as a firmware does that keeps its settings there.

QEMU programs flash by writing to a RAM block of its own, from the thread that the command comes
from.  Here that is its main loop, by its port for tests (`-qtest`): it takes commands to write to
guest memory whatever runs the guest, and changes nothing else about the machine.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

from lab.errors import QmpError
from lab.vm.devices import FLASH_BYTES
from lab.vm.vm import RunningVM

_TOP = 1 << 32
"""Where the firmware's flash ends; the other one is below that."""
_PROGRAM = 0x40
_ERASE, _CONFIRM = 0x20, 0xD0
_READ = 0xFF
_BLOCK_BYTES = 4096

ERASE_EVERY = 16
"""One in so many commands erases a block, and the others program a byte."""
PAUSE_S = 0.002
ANSWER_S = 60.0


class FlashWriter:
    """One connection to the port of a guest that has flash."""

    def __init__(
        self, base: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._base = base
        self._reader = reader
        self._writer = writer
        self._random = random.Random(base)
        self.writes = 0
        """How many commands the flash has carried out."""

    async def write(self) -> None:
        """Program a byte of the flash, or erase a block of it; which one is random.

        :raise QmpError: when QEMU does not do it.
        """
        at = self._base + self._random.randrange(FLASH_BYTES)
        if self._random.randrange(ERASE_EVERY):
            await self._store(at, _PROGRAM)
            await self._store(at, self._random.randrange(256))
        else:
            at -= at % _BLOCK_BYTES
            await self._store(at, _ERASE)
            await self._store(at, _CONFIRM)
        await self._store(at, _READ)
        self.writes += 1

    async def _store(self, address: int, value: int) -> None:
        self._writer.write(f"writeb {address:#x} {value:#x}\n".encode())
        await self._writer.drain()
        try:
            async with asyncio.timeout(ANSWER_S):
                answer = await self._reader.readline()
        except TimeoutError:
            answer = b""
        if answer.strip() != b"OK":
            said = answer.decode(errors="replace").strip() or "nothing"
            raise QmpError(f"QEMU was to write to flash, and says {said}")


@contextlib.asynccontextmanager
async def flash_writer(vm: RunningVM) -> AsyncIterator[FlashWriter]:
    """Connect to the flash of a guest that has some.

    :raise QmpError: when QEMU does not listen.
    """
    base = _TOP - vm.files.firmware.stat().st_size - FLASH_BYTES
    try:
        reader, writer = await asyncio.open_unix_connection(vm.files.flash_port)
    except OSError as error:
        raise QmpError(f"QEMU does not take commands for its flash: {error}") from error
    try:
        yield FlashWriter(base, reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def write_flash(vm: RunningVM) -> None:
    """Write to the flash of a guest until cancelled.

    :raise QmpError: when QEMU does not do it.
    """
    async with flash_writer(vm) as flash:
        while True:
            await flash.write()
            await asyncio.sleep(PAUSE_S)
