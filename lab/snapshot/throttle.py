"""Storage that is slower than memory: what QEMU writes an image to instead of to the file itself.

QEMU migrates to a socket whose other end is a process of its own (`lab.snapshot.slowdisk`), which
writes the file no faster than it is told.  The socket's buffer is small, so that QEMU waits as it
would for a disk.  It is a process because this interpreter samples the guest meanwhile, and its
threads take turns.

What QEMU has handed over and the file does not have yet is at most a socket's buffer and one piece:
`BUFFER_BYTES` and `lab.snapshot.slowdisk.piece_bytes`.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from lab.errors import SnapshotError
from lab.host.process import KILL_GRACE_S, kill_child, wrapped
from lab.snapshot import slowdisk

log = logging.getLogger(__name__)

BUFFER_BYTES = 128 << 10
"""How much the socket holds; the kernel counts its own bookkeeping too, so less of the stream."""

START_TIMEOUT_S = 60.0

FINISH_TIMEOUT_S = 120.0
"""How long writing a buffer may take at the end: a fraction of a second, or the disk hangs."""

REASON_TIMEOUT_S = 5.0


class LimitedStorage:
    """A file that is written at a limited rate.  Made by `limited`."""

    def __init__(self, process: asyncio.subprocess.Process, sender: socket.socket) -> None:
        self._process = process
        self._said = b""
        self.sender = sender
        """Write the file's content here; to be closed when somebody else has it."""

    @property
    def pid(self) -> int:
        """The process that writes the file."""
        return self._process.pid

    async def finish(self) -> None:
        """Wait until all that was sent is in the file.

        :raise SnapshotError: when it could not be written.
        """
        reason = await self._reason(FINISH_TIMEOUT_S)
        if reason is None and self._process.returncode is None:
            reason = f"its last bytes were not written within {FINISH_TIMEOUT_S:g} s"
        if reason is not None:
            raise SnapshotError(f"the image cannot be written: {reason}")

    async def reason(self) -> str | None:
        """Return why the file could not be written, None when nothing is wrong with that."""
        return await self._reason(REASON_TIMEOUT_S)

    async def _reason(self, timeout_s: float) -> str | None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._process.wait()
        code = self._process.returncode
        if not code:
            return None
        assert self._process.stderr is not None
        self._said += await self._process.stderr.read()
        said = self._said.decode(errors="replace").strip()
        if code < 0:
            return f"the process that writes it was ended by {signal.Signals(-code).name}"
        return said.splitlines()[-1] if said else f"exit status {code}"


@contextlib.asynccontextmanager
async def limited(image: Path, mib_per_s: int) -> AsyncIterator[LimitedStorage]:
    """Write `image`, which is there, no faster than so many MiB a second.

    The process that does so is gone when the context is left.

    :raise SnapshotError: when it does not start.
    :raise HostError: when a program is missing.
    """
    receiver, sender = socket.socketpair()
    with sender:
        # The kernel doubles what it is told, for its bookkeeping.
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES // 2)
        with receiver, image.open("r+b", buffering=0) as file:
            program = [sys.executable, "-I", "-S", str(Path(slowdisk.__file__))]
            process = await asyncio.create_subprocess_exec(
                *wrapped([*program, str(mib_per_s << 20)], thp=None),
                stdin=receiver.fileno(),
                stdout=file,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
                cwd=os.sep,
            )
        storage = LimitedStorage(process, sender)
        try:
            await _until_ready(process, storage)
            yield storage
        finally:
            # First of all, because it cannot be interrupted: what follows only reaps.
            kill_child(process)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KILL_GRACE_S):
                    await process.wait()
            if process.returncode is None:
                log.error("process %d does not end; the kernel holds it", process.pid)


async def _until_ready(process: asyncio.subprocess.Process, storage: LimitedStorage) -> None:
    assert process.stderr is not None
    line = b""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(START_TIMEOUT_S):
            line = await process.stderr.readline()
    if line != b"ready\n":
        raise SnapshotError(
            "the process that is to write the image does not start: "
            f"{line.decode(errors='replace').strip() or await storage.reason() or 'it is silent'}"
        )
