"""Drive a guest's devices from outside, through QEMU's qtest protocol, as no guest of the lab does.

The guest is not asked, nor does it notice: QEMU executes the accesses between two instructions.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from lab.session import VM

_PCI_ADDRESS, _PCI_DATA = 0xCF8, 0xCFC


def door_arguments(folder: Path) -> tuple[str, ...]:
    """Return QEMU's arguments that make a door in `folder`."""
    return ("-qtest", f"unix:{folder / 'door'},server=on,wait=off", "-qtest-log", "none")


class Door:
    """A connection to the door of one QEMU."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, command: str) -> str:
        """Execute one command, such as `outb 0x505 1`, and return its answer."""
        self._writer.write(f"{command}\n".encode())
        while (line := (await self._reader.readline()).decode()).startswith("IRQ"):
            pass
        assert line.startswith("OK"), f"{command}: {line!r}"
        return line.removeprefix("OK").strip()

    async def configure(
        self, device: int, function: int, register: int, value: int, write: str = "outl"
    ) -> None:
        """Write to the configuration of a PCI device on the first bus, 32 bits or as told."""
        address = 0x80000000 | device << 11 | function << 8 | register
        await self.send(f"outl {_PCI_ADDRESS:#x} {address:#x}")
        await self.send(f"{write} {_PCI_DATA:#x} {value:#x}")


@contextlib.asynccontextmanager
async def door(folder: Path) -> AsyncIterator[Door]:
    """Connect to the QEMU that was started last with the door in `folder`."""
    reader, writer = await asyncio.open_unix_connection(folder / "door")
    try:
        yield Door(reader, writer)
    finally:
        writer.close()


async def single_step(vm: VM, folder: Path) -> None:
    """Execute one instruction of the guest as a debugger does that is attached to QEMU."""
    path = folder / "debugger"
    path.unlink(missing_ok=True)
    await vm.hmp(f"gdbserver unix:{path},server=on,wait=off")
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(b"$s#73")
        # Its answer is a packet with the signal that stopped the guest.
        while not (await reader.readuntil(b"#")).rpartition(b"$")[2].startswith(b"T05"):
            writer.write(b"+")
        await reader.readexactly(2)
        writer.write(b"+")
        await writer.drain()
    finally:
        writer.close()
