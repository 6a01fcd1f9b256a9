"""A change of any bit of a file is found, and where it is."""

import asyncio
import hashlib
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.snapshot.checksums import PIECE_BYTES, Checksums, checksums_of, damaged_pieces

PIECE = 64


@given(st.binary(min_size=1, max_size=5 * PIECE), st.data())
def test_any_flipped_bit_is_found_in_its_piece(content: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(content) - 1))
    bit = data.draw(st.integers(0, 7))

    async def check() -> None:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "image"
            path.write_bytes(content)
            sums = await checksums_of(path, len(content), piece_bytes=PIECE)
            assert sums.covers(len(content))
            assert await damaged_pieces(path, len(content), sums) == []
            flipped = bytearray(content)
            flipped[at] ^= 1 << bit
            path.write_bytes(flipped)
            assert await damaged_pieces(path, len(content), sums) == [at // PIECE]

    asyncio.run(check())


@given(st.binary(max_size=5 * PIECE))
def test_each_piece_has_its_own_checksum(content: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        path.write_bytes(content)
        found = asyncio.run(checksums_of(path, len(content), piece_bytes=PIECE))
    pieces = [content[at : at + PIECE] for at in range(0, len(content), PIECE)]
    assert found.sha256 == tuple(hashlib.sha256(piece).hexdigest() for piece in pieces)


async def test_holes_count_as_the_zeros_that_they_read_as(tmp_path: Path) -> None:
    size = 3 * PIECE_BYTES + 5
    sparse, dense = tmp_path / "sparse", tmp_path / "dense"
    with sparse.open("wb") as file:
        os.pwrite(file.fileno(), b"data", PIECE_BYTES + 1)
        file.truncate(size)
    dense.write_bytes(sparse.read_bytes())
    assert sparse.stat().st_blocks < dense.stat().st_blocks
    assert await checksums_of(sparse, size) == await checksums_of(dense, size)


async def test_a_file_that_is_cut_short_meanwhile_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(PIECE))
    with pytest.raises(OSError, match=f"it ends at byte {PIECE}"):
        await checksums_of(path, 2 * PIECE, piece_bytes=PIECE)


async def test_cancelling_leaves_no_descriptor_open(tmp_path: Path) -> None:
    path = tmp_path / "image"
    with path.open("wb") as file:
        for _ in range(4):
            file.write(os.urandom(PIECE_BYTES))
    before = set(Path("/proc/self/fd").iterdir())
    task = asyncio.create_task(checksums_of(path, 4 * PIECE_BYTES))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert set(Path("/proc/self/fd").iterdir()) == before


@pytest.mark.parametrize(("size", "covered"), [(0, False), (1, True), (64, True), (65, False)])
def test_checksums_of_another_size_do_not_cover_a_file(size: int, covered: bool) -> None:
    assert Checksums(piece_bytes=PIECE, sha256=("0" * 64,)).covers(size) is covered
