"""Host memory is held, touched, and let go of."""

import psutil
import pytest

from lab.measure import hostwarm as warmth
from lab.measure.hostwarm import MARGIN_MIB, WarmMemory


def resident_mib() -> int:
    return int(psutil.Process().memory_info().rss) >> 20


async def test_host_memory_is_held_while_it_is_warmed_and_then_let_go() -> None:
    before = resident_mib()
    with WarmMemory() as warm:
        await warm.hold(8)
        assert warm.held_mib == 8 + MARGIN_MIB
        assert resident_mib() - before > MARGIN_MIB // 2
        # What is held already is not taken twice.
        await warm.hold(4)
        assert warm.held_mib == 8 + MARGIN_MIB
        warm.release()
        assert warm.held_mib == 0
        assert resident_mib() - before < MARGIN_MIB // 2
        await warm.hold_again(8)
        assert warm.held_mib == 8 + MARGIN_MIB
    assert resident_mib() - before < MARGIN_MIB // 2


async def test_nothing_is_held_that_the_next_guest_may_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with WarmMemory() as warm:
        await warm.hold_again(warmth.KEPT_MIB)
        assert warm.held_mib == 0
        await warm.hold(1)
        monkeypatch.setattr(warmth, "available_memory_mib", lambda: 2 * MARGIN_MIB)
        warm.make_room(1)
        assert warm.held_mib == 0
