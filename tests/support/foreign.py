"""A QEMU that the lab did not start, with a guest that counts on its disk."""

import asyncio
import contextlib
import os
import signal
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.vm.argv import CommandLine
from lab.vm.qmp import Qmp, connected

SECTOR = 512
DISK_SECTORS = 16384
BOUND_S = 60

# The firmware runs it.  It counts in memory, and writes each number to the second sector.
_COUNTER = bytes.fromhex(
    "31c0"  # xor ax, ax
    "8ed8 8ec0 8ed0"  # mov ds, ax; mov es, ax; mov ss, ax
    "bc007c"  # mov sp, 0x7c00
    "66c706008000000000"  # mov dword [0x8000], 0
    "66ff060080"  # count: inc dword [0x8000]
    "b80103"  # mov ax, 0x0301: write one sector
    "bb0080"  # mov bx, 0x8000
    "b90200"  # mov cx, 2: the second sector
    "30f6"  # xor dh, dh
    "cd13"  # int 0x13
    "ebec"  # jmp count
)


def boot_disk() -> bytes:
    """Return the content of a disk with the counting guest."""
    sector = _COUNTER.ljust(SECTOR - 2, b"\0") + b"\x55\xaa"
    return sector.ljust(DISK_SECTORS * SECTOR, b"\0")


@dataclass(frozen=True)
class Foreign:
    """A QEMU that runs, and its monitor."""

    pid: int
    qmp: Qmp


@contextlib.asynccontextmanager
async def started(
    command: Sequence[str | Path], monitor: Path, *, pass_fds: Sequence[int] = ()
) -> AsyncIterator[Foreign]:
    """Start a QEMU as a user would, whose line makes a QMP socket at `monitor`."""
    async with _process(command, folder=monitor.parent, pass_fds=pass_fds) as process:
        with socket.socket(socket.AF_UNIX) as link:
            async with asyncio.timeout(BOUND_S):
                while True:
                    assert process.returncode is None, "QEMU did not start"
                    with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                        link.connect(str(monitor))
                        break
                    await asyncio.sleep(0.02)
            async with connected(link) as qmp:
                yield Foreign(process.pid, qmp)


@contextlib.asynccontextmanager
async def restoring(
    line: CommandLine, child: socket.socket, own: socket.socket
) -> AsyncIterator[Foreign]:
    """Start a QEMU by a line that was made to restore, with a monitor on `child`."""
    command: list[str | Path] = [line.program, *line.arguments]
    async with _process(command, folder=line.folder, pass_fds=[child.fileno()]) as process:
        child.close()
        async with connected(own) as qmp:
            yield Foreign(process.pid, qmp)


@contextlib.asynccontextmanager
async def _process(
    command: Sequence[str | Path], *, folder: Path, pass_fds: Sequence[int] = ()
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, stdin=asyncio.subprocess.DEVNULL, pass_fds=pass_fds
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
        await process.wait()


async def status(qmp: Qmp) -> str:
    """Return the run state."""
    return str((await qmp.execute("query-status"))["status"])


async def save(qmp: Qmp, image: Path) -> None:
    """Write the machine's state to a file while it stands still."""
    with image.open("wb") as file:
        await qmp.send_descriptor("image", file.fileno())
        await qmp.execute("migrate", {"uri": "fd:image"})
        await _migrated(qmp)


async def load(qmp: Qmp, image: Path) -> None:
    """Read the machine's state from a file."""
    with image.open("rb") as file:
        await qmp.send_descriptor("image", file.fileno())
        await qmp.execute("migrate-incoming", {"uri": "fd:image"})
        await _migrated(qmp)


async def _migrated(qmp: Qmp) -> None:
    async with asyncio.timeout(BOUND_S):
        while (found := await qmp.execute("query-migrate")).get("status") != "completed":
            assert found.get("status") != "failed", found
            await asyncio.sleep(0.02)


async def qemu_img(program: Path, *arguments: str | Path) -> None:
    """Run qemu-img."""
    process = await asyncio.create_subprocess_exec(
        program, *arguments, stdout=asyncio.subprocess.DEVNULL
    )
    assert await process.wait() == 0


async def counted(program: Path, image: Path, scratch: Path) -> int:
    """Return the number that the guest wrote last to a disk which nobody has open."""
    await qemu_img(program, "convert", "-O", "raw", image, scratch)
    with scratch.open("rb") as file:
        file.seek(SECTOR)
        (number,) = struct.unpack("<I", file.read(4))
    return int(number)
