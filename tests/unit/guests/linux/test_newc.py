"""The initramfs's archive: what goes in comes out, and always as the same bytes."""

import shutil
import stat
import subprocess
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.guests.linux import newc

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1)
COMPONENTS = NAMES.filter(lambda name: name not in (".", "..", "TRAILER!!!"))
PATHS = st.lists(COMPONENTS, min_size=1, max_size=3).map("/".join)
ENTRIES = st.lists(
    st.one_of(
        st.builds(newc.directory, PATHS),
        st.builds(newc.regular_file, PATHS, st.binary(max_size=40)),
        st.builds(newc.character_device, PATHS, st.integers(0, 4095), st.integers(0, 1 << 20)),
    ),
    max_size=6,
    unique_by=lambda entry: entry.path,
)


@given(ENTRIES)
def test_every_entry_comes_back(entries: list[newc.Entry]) -> None:
    back = list(newc.read_archive(newc.write_archive(entries)))
    assert sorted(back, key=lambda e: e.path) == sorted(entries, key=lambda e: e.path)


@given(ENTRIES, st.randoms())
def test_the_bytes_do_not_depend_on_the_order_of_the_entries(
    entries: list[newc.Entry], random: Random
) -> None:
    shuffled = list(entries)
    random.shuffle(shuffled)
    assert newc.write_archive(shuffled) == newc.write_archive(entries)


@given(ENTRIES, st.integers(0, 10_000))
def test_a_truncated_archive_is_refused(entries: list[newc.Entry], cut: int) -> None:
    whole = newc.write_archive(entries)
    # The trailer's own padding may go; nothing before it may.
    with pytest.raises(ValueError):
        list(newc.read_archive(whole[: min(cut, len(whole) - len("TRAILER!!!") - 8)]))


def test_headers_hold_no_time_and_no_owner() -> None:
    archive = newc.write_archive([newc.regular_file("init", b"x", 0o755)])
    fields = [int(archive[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
    inode, mode, uid, gid, links, mtime, size, *_ = fields
    assert (inode, mode, uid, gid, links, mtime, size) == (1, stat.S_IFREG | 0o755, 0, 0, 1, 0, 1)


def test_a_parent_precedes_its_children_even_beside_a_longer_name() -> None:
    entries = [newc.directory("a/b"), newc.directory("a-b"), newc.directory("a")]
    paths = [entry.path for entry in newc.read_archive(newc.write_archive(entries))]
    assert paths.index("a") < paths.index("a/b")


@pytest.mark.parametrize("path", ["", "/init", "a//b", "a/../b", "./a", "a\0b", "TRAILER!!!"])
def test_a_path_that_an_archive_cannot_hold_is_refused(path: str) -> None:
    with pytest.raises(ValueError):
        newc.directory(path)


def test_the_same_path_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        newc.write_archive([newc.directory("a"), newc.regular_file("a", b"")])


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is not installed")
def test_cpio_lists_the_same_members(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(
        newc.write_archive([newc.directory("d"), newc.regular_file("d/file", b"12345")])
    )
    with archive.open("rb") as file:
        listing = subprocess.run(
            ["cpio", "-t", "--quiet"], stdin=file, capture_output=True, check=True, text=True
        )
    assert listing.stdout.split() == ["d", "d/file"]
