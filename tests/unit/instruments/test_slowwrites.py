"""Slow operations come out of the guest's ring in the order in which they were noted."""

import ctypes
import subprocess

import numpy as np
import pandas as pd
import pytest

from lab.guests.kinds import include_options
from lab.guests.protocol import PAGE_BYTES, SLOW_ENTRIES, SLOW_WORDS
from lab.instruments.slowwrites import forgotten, noted_since, slow_entries
from lab.scenario.guests import GUEST_LIMITS

SOURCE = """
#include "writers.h"
static void page_is_bad(struct writer *w, uint64_t page) { (void)w; (void)page; }
void note(uint64_t *ring, uint64_t count, uint64_t first)
{
    struct writer w = {.slow = ring, .first = first};

    for (uint64_t op = 1; op <= count; op++) {
        w.done = op;
        note_slow(&w, 3 * op, 1000 * op, 7 * op);
    }
}
"""


@pytest.fixture(scope="module")
def guest_code(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("note")
    (folder / "note.c").write_text(SOURCE)
    includes = include_options(folder, GUEST_LIMITS["micro"])
    command = ("gcc", "-std=gnu11", "-O2", "-shared", "-fPIC", *includes, "-Wno-unused")
    subprocess.run([*command, "-o", folder / "note.so", folder / "note.c"], check=True)
    return ctypes.CDLL(str(folder / "note.so"))


@pytest.mark.parametrize("noted", [0, 1, SLOW_ENTRIES - 1, SLOW_ENTRIES, 3 * SLOW_ENTRIES + 17])
def test_the_last_of_what_was_noted_is_read_oldest_first(
    noted: int, guest_code: ctypes.CDLL
) -> None:
    ring = (ctypes.c_uint64 * (SLOW_ENTRIES * SLOW_WORDS))()
    guest_code.note(ring, ctypes.c_uint64(noted), ctypes.c_uint64(5))
    entries = slow_entries(bytes(ring))
    op = np.arange(max(1, noted - SLOW_ENTRIES + 2), noted + 1, dtype=np.uint64)
    expected = np.stack([1000 * op, 7 * op, 5 + 3 * op, op], axis=1)
    assert (entries == expected).all()
    assert entries.shape == expected.shape


def test_the_ring_is_whole_pages() -> None:
    assert SLOW_ENTRIES * SLOW_WORDS * 8 % PAGE_BYTES == 0


def test_what_a_guest_remembered_before_is_not_new() -> None:
    def noted(*operations: tuple[int, int]) -> pd.DataFrame:
        return pd.DataFrame(operations, columns=["thread", "op"])

    after = noted((0, 5), (1, 2), (0, 6), (1, 9), (2, 1))
    assert noted_since(noted((0, 5), (1, 2)), after).values.tolist() == [[0, 6], [1, 9], [2, 1]]
    assert len(noted_since(noted(), after)) == len(after)


def test_a_thread_that_wrote_over_what_was_not_read_is_named() -> None:
    def noted(thread: int, first: int, count: int) -> pd.DataFrame:
        return pd.DataFrame({"thread": thread, "op": range(first, first + count)})

    full = SLOW_ENTRIES - 1
    before = pd.concat([noted(0, 10, 1), noted(1, 10, 1)])
    assert forgotten(before, noted(0, 11, full - 1)) == []
    assert forgotten(before, noted(0, 10, full)) == []
    assert forgotten(before, pd.concat([noted(0, 11, full), noted(1, 11, 5)])) == [0]
    assert forgotten(noted(0, 1, 0), noted(2, 1, full)) == [2]
