"""Hold QEMU in a phase of a snapshot, or make a system call of it fail: the test's side of gate.c.

The kernel, QEMU and the guest are the real ones; what is injected is the moment, and the error.
"""

import asyncio
import errno
import mmap
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

#: In the order of gate.c. Which phase a call belongs to differs between engines: `copy` registers
#: and protects ahead of the pause, the others in it.
NAMES = (
    "register",
    "protect",
    "release",
    "wake",
    "unregister",
    "close",
    "read",
    "write",
    "truncate",
)
OPEN, HOLD, FAIL, SILENT = range(4)
_GATE = struct.Struct("=4i")
_SOURCE = Path(__file__).with_name("gate.c")


class Gates:
    """All gates of one QEMU; open to begin with."""

    def __init__(self, folder: Path) -> None:
        self.library = folder / "gate.so"
        self.path = folder / "gates"
        compiler = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(self.library), str(_SOURCE)]
        subprocess.run(compiler, check=True)
        self.path.write_bytes(bytes(mmap.PAGESIZE))
        with self.path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), mmap.PAGESIZE)

    def _set(self, name: str, state: int, *, error: int = 0, skip: int = 0) -> None:
        # The state last: it is what the other side looks at first.
        at = NAMES.index(name) * _GATE.size
        self._page[at + 4 : at + 16] = struct.pack("=3i", error, skip, 0)
        self._page[at : at + 4] = struct.pack("=i", state)

    def hits(self, name: str) -> int:
        """How many calls the gate has held or failed since it was shut."""
        return int(_GATE.unpack_from(self._page, NAMES.index(name) * _GATE.size)[3])

    def open(self, name: str) -> None:
        """Let calls pass again, those that wait included."""
        self._set(name, OPEN)

    @contextmanager
    def held(self, name: str, *, skip: int = 0) -> Iterator[None]:
        """Hold calls, after the first `skip`, until the context is left."""
        self._set(name, HOLD, skip=skip)
        try:
            yield
        finally:
            self.open(name)

    @contextmanager
    def failing(self, name: str, *, error: int = errno.ENOMEM, skip: int = 0) -> Iterator[None]:
        """Fail calls, after the first `skip`, until the context is left."""
        self._set(name, FAIL, error=error, skip=skip)
        try:
            yield
        finally:
            self.open(name)

    @contextmanager
    def silent(self, name: str) -> Iterator[None]:
        """Let releases, or calls that do nothing else, wake nobody, until the context is left."""
        self._set(name, SILENT)
        try:
            yield
        finally:
            self.open(name)

    async def reached(self, name: str) -> None:
        """Wait until a call is held, or has failed."""
        async with asyncio.timeout(60):
            while not self.hits(name):
                await asyncio.sleep(0.001)


@contextmanager
def gates(folder: Path) -> Iterator[Gates]:
    """Give gates to every QEMU that is started inside the context."""
    made = Gates(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(made.library))
        patch.setenv("LAB_GATES", str(made.path))
        yield made
