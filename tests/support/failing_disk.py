"""File systems that fail a snapshot: one that is full after so many bytes, one that stalls.

Each is mounted in a mount namespace of its own, held by a process that undoes everything as soon
as its standard input is closed, whatever becomes of the test. Others reach the file system through
that process's root.

That process has a session of its own and no ear for signals: an interrupt of the terminal, or who
ends a whole group of processes, would end it together with the test, and nobody would be left to
thaw what it froze.
"""

import asyncio
import contextlib
import mmap
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

MOUNT = "/mnt"

_DEAF = "trap '' INT TERM HUP QUIT PIPE\n"

_FULL = """
mount -t tmpfs -o size={size} tmpfs {mount} && echo done && exec cat
"""

# Whoever writes to a frozen file system sleeps in the kernel until it is thawed, and nothing wakes
# him before, not even SIGKILL.
_STALLING = """
set -e
truncate -s {size} {image}
mkfs.ext4 -q -F -m 0 -O ^has_journal {image}
mount -o loop {image} {mount}
rm {image}
trap 'fsfreeze -u {mount} 2>/dev/null; umount -l {mount}' EXIT
echo done
while read -r command; do
    fsfreeze "$command" {mount}
    echo done
done
"""


class Mount:
    """A mounted file system, and the process that holds it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.holder = process.pid
        self.folder = Path(f"/proc/{process.pid}/root{MOUNT}")

    async def _says_done(self) -> bool:
        assert self._process.stdout is not None
        async with asyncio.timeout(60):
            return await self._process.stdout.readline() == b"done\n"

    async def _tell(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n".encode())
        await self._process.stdin.drain()
        assert await self._says_done()

    async def freeze(self) -> None:
        """Let nobody write any more; who tries waits."""
        await self._tell("-f")

    async def thaw(self) -> None:
        """Let everybody go on."""
        await self._tell("-u")


@contextlib.asynccontextmanager
async def _mounted(script: str) -> AsyncIterator[Mount]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    process = await asyncio.create_subprocess_exec(
        *("unshare", "--mount", "sh", "-c", _DEAF + script),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    mount = Mount(process)
    try:
        if not await mount._says_done():
            pytest.skip("nothing can be mounted here, such as in a container")
        yield mount
    finally:
        process.stdin.close()
        await process.wait()


@contextlib.asynccontextmanager
async def full_after(size_bytes: int) -> AsyncIterator[Path]:
    """Give a folder in which writing fails with ENOSPC after so many bytes, in whole pages."""
    size = max(size_bytes // mmap.PAGESIZE, 1) * mmap.PAGESIZE
    async with _mounted(_FULL.format(size=size, mount=MOUNT)) as mount:
        yield mount.folder


@contextlib.asynccontextmanager
async def stalling(image: Path, size_mib: int) -> AsyncIterator[Mount]:
    """Give a file system that can be frozen; it lies in a file `image`, which is made."""
    if not Path("/dev/loop-control").exists():
        pytest.skip("no loop devices on this host")
    script = _STALLING.format(size=f"{size_mib}M", image=image, mount=MOUNT)
    async with _mounted(script) as mount:
        yield mount
