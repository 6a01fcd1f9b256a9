"""Checksums of an image, piece by piece, and what differs from them.

QEMU's formats have none: a flipped bit in a page is restored as it is, and the guest is silently
another one.  The sidecar of an image has the checksums of what QEMU wrote, made of the file while
it is still in the host's page cache, and a restore reads the image against them first.

What they do not show: whether QEMU wrote the right bytes.  That is what `lab.verify.oracle` is for.
"""

import asyncio
import hashlib
import os
from collections.abc import Awaitable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

PIECE_BYTES = 16 << 20
"""Large enough for the sidecar to stay small (4 KiB for each GiB of image), small enough for
every CPU to have its share of a small image, and for telling where the damage is."""

_READ_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Checksums:
    """The SHA-256 of each `piece_bytes` of a file, in hexadecimal; the last may be shorter."""

    piece_bytes: int
    sha256: tuple[str, ...]

    def covers(self, size: int) -> bool:
        """Whether there is one for each piece of a file of `size` bytes."""
        return self.piece_bytes > 0 and len(self.sha256) == -(-size // self.piece_bytes)


async def checksums_of(file: Path | int, size: int, *, piece_bytes: int = PIECE_BYTES) -> Checksums:
    """Read the `size` bytes of a file, or of an open one, on as many threads as there are CPUs.

    Holes are not read.  Cancelling stops the threads after the pieces that they are at.

    :raise OSError: when it cannot be read.
    """
    limit = asyncio.Semaphore(os.cpu_count() or 1)
    # The caller of a task that was cancelled may close its own.
    descriptor = (
        os.dup(file) if isinstance(file, int) else os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    )
    try:

        async def piece(start: int) -> str:
            async with limit:
                length = min(piece_bytes, size - start)
                return await _to_its_end(asyncio.to_thread(_sha256, descriptor, start, length))

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(piece(start)) for start in range(0, size, piece_bytes)]
    except ExceptionGroup as errors:
        # All threads read the same file: the first says what is wrong with it.
        raise errors.exceptions[0] from None
    finally:
        os.close(descriptor)
    return Checksums(piece_bytes=piece_bytes, sha256=tuple(task.result() for task in tasks))


async def damaged_pieces(file: Path | int, size: int, expected: Checksums) -> list[int]:
    """Return which pieces of a file differ from their checksums.

    :raise OSError: when it cannot be read.
    """
    found = await checksums_of(file, size, piece_bytes=expected.piece_bytes)
    pairs = zip(found.sha256, expected.sha256, strict=True)
    return [index for index, (is_now, was) in enumerate(pairs) if is_now != was]


async def _to_its_end(work: Awaitable[str]) -> str:
    """Await a thread, even when cancelled: it reads from a descriptor that is closed after it."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _sha256(descriptor: int, start: int, length: int) -> str:
    if _is_hole(descriptor, start, length):
        return _sha256_of_zeros(length)
    found = hashlib.sha256()
    end = start + length
    while start < end:
        content = os.pread(descriptor, min(_READ_BYTES, end - start), start)
        if not content:
            raise OSError(0, f"it ends at byte {start}")
        found.update(content)
        start += len(content)
    return found.hexdigest()


def _is_hole(descriptor: int, start: int, length: int) -> bool:
    try:
        return os.lseek(descriptor, start, os.SEEK_DATA) >= start + length
    except OSError:
        # No data up to the end of the file, or a file system that does not tell: both are read.
        return False


@lru_cache(maxsize=4)
def _sha256_of_zeros(length: int) -> str:
    return hashlib.sha256(bytes(length)).hexdigest()
