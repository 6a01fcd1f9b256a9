"""What the engines are called, and how much each handles at a time."""

import pytest

from lab.errors import UsageError
from lab.scenario.engines import DENSE_PAGES, ENGINES, Sizes
from lab.scenario.machine import Machine
from lab.scenario.methods import METHODS


def test_the_engines_of_methods_are_those_that_there_are() -> None:
    assert {how.engine for how in METHODS.values() if how.engine} == set(ENGINES)


def test_only_the_engine_with_sizes_handles_more_than_a_page_at_a_time() -> None:
    sizes = Sizes(fault_around_pages=16, chunk_kib=8192)
    released = {e.name: (e.sweep_pages(sizes), e.fault_pages(sizes)) for e in ENGINES.values()}
    assert released == {"copy": (2048, 16), "rfc": (1, 1), "inline": (1, 1)}
    assert Sizes().fault_pages == DENSE_PAGES


@pytest.mark.parametrize(
    ("sizes", "huge", "needed_kib"),
    [
        (Sizes(), False, 2048 + 256),
        (Sizes(), True, 2048 + 2048),
        (Sizes(fault_around_pages=1024, chunk_kib=4096), False, 4096 + 4096),
        (Sizes(fault_around_pages=1, chunk_kib=256), False, 256 + 256),
    ],
)
def test_the_buffer_has_room_for_a_chunk_and_what_a_fault_takes_along(
    sizes: Sizes, huge: bool, needed_kib: int
) -> None:
    assert sizes.buffer_needed_kib(huge=huge) == needed_kib


def test_a_machine_has_the_sizes_that_it_was_asked_for() -> None:
    assert Machine(chunk_kib=256).sizes == Sizes(chunk_kib=256)
    assert not Machine().sets_sizes
    with pytest.raises(UsageError, match="power of two"):
        Sizes(chunk_kib=300)
