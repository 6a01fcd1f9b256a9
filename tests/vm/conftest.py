"""Fixtures of tests that run guests."""

from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

import lab
from lab.host import huge_pages
from lab.scenario import HUGE_PAGE_MIB
from lab.vm import VM

_NR_HUGEPAGES = Path(f"/sys/kernel/mm/hugepages/hugepages-{HUGE_PAGE_MIB * 1024}kB/nr_hugepages")


@pytest.fixture
def reserve_huge_pages() -> Iterator[Callable[[int], str]]:
    """A function that sees to it that so many MiB of huge pages can be had, until the test ends.

    It returns why not, where that needs permission or memory that is not there.
    """
    before = huge_pages()[0]

    def reserve(needed_mib: int) -> str:
        reserved, available = huge_pages()
        missing = -(-needed_mib // HUGE_PAGE_MIB) - available
        if missing <= 0:
            return ""
        try:
            _NR_HUGEPAGES.write_text(str(reserved + missing))
        except OSError as error:
            return f"huge pages can not be reserved: {error.strerror}"
        if huge_pages()[1] * HUGE_PAGE_MIB < needed_mib:
            return f"this host has no {needed_mib} MiB of huge pages"
        return ""

    yield reserve
    if huge_pages()[0] != before:
        _NR_HUGEPAGES.write_text(str(before))


@pytest.fixture
def damage_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte of one page of every image is changed before the oracle restores it.

    For images that are a stream of pages.  In one where each page has its place, the middle may
    be a hole that nobody reads.
    """

    def restore_damaged(
        path: Path, *, paused: bool, channels: int
    ) -> AbstractAsyncContextManager[VM]:
        with path.open("r+b") as file:
            # The middle of the image is page data, of which a header is a 512th.
            file.seek(path.stat().st_size // 2 // 4096 * 4096 + 2048)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 0x40]))
        return lab.restore(path, paused=paused, channels=channels)

    monkeypatch.setattr("lab.oracle.restore", restore_damaged)
