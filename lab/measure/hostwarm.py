"""Host memory that a snapshot is going to use, touched beforehand.

Under a hypervisor that takes free memory back, memory that nobody has used lately is slow to get:
without this, durations vary by a factor of three with what ran before.  Such a host may take memory
back within half a second, so what is measured has to follow at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
from typing import Self

from lab.host.needs import available_memory_mib

MARGIN_MIB = 512
"""Held beyond what the guest has: the image's metadata, the copy buffer, QEMU itself."""

KEPT_MIB = 4096
"""No more than so much is held from one sample to the next, when a guest has to boot beside it."""

_CHUNK_BYTES = 32 << 20
_MADV_POPULATE_WRITE = 23


class WarmMemory:
    """Memory that is held, touched, and let go of in time for somebody else to use it.

    A campaign takes back right after a snapshot what it let go of before: while the host's host has
    not noticed yet, that takes a tenth of a second and not several.
    """

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def held_mib(self) -> int:
        """How much is held now."""
        return 0 if self._memory is None else len(self._memory) >> 20

    async def hold(self, ram_mib: int) -> None:
        """Hold about as much as a snapshot of a guest with `ram_mib` of RAM is going to use; at
        most half of what is available.
        """
        if self.held_mib >= ram_mib + MARGIN_MIB:
            return
        self.release()
        size = min(ram_mib + MARGIN_MIB, available_memory_mib() // 2) << 20
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory = memory
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, size, _CHUNK_BYTES):
            length = min(_CHUNK_BYTES, size - start)
            try:
                memory.madvise(_MADV_POPULATE_WRITE, start, length)
            except OSError:
                # Linux before 5.14 does not know it: write to every page instead.
                memory[start : start + length : mmap.PAGESIZE] = bytes(length // mmap.PAGESIZE)
            # A chunk takes about 10 ms: interrupts and heartbeats get their turn in between.
            await asyncio.sleep(0)

    async def hold_again(self, ram_mib: int) -> None:
        """Hold the same for the next sample, unless it is so much that its guest may need it."""
        if ram_mib + MARGIN_MIB <= KEPT_MIB:
            await self.hold(ram_mib)

    def make_room(self, ram_mib: int) -> None:
        """Let go of it if a guest with `ram_mib` of RAM might not get its memory beside it."""
        if available_memory_mib() < 2 * (ram_mib + MARGIN_MIB):
            self.release()

    def release(self) -> None:
        """Let go of it."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None
