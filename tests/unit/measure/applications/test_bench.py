"""When a load has settled."""

import numpy as np
import pytest

from lab.measure.applications.bench import is_late
from lab.units import NS_PER_MS, NS_PER_S


@pytest.mark.parametrize(
    ("done_per_s", "asked_per_s", "late"),
    [
        (1000, None, False),
        (1000, 1000.0, False),
        (1030, 1000.0, False),
        (2000, 1000.0, True),
    ],
)
def test_what_works_off_a_backlog_has_not_settled(
    done_per_s: int, asked_per_s: float | None, late: bool
) -> None:
    t_ns = np.arange(0, NS_PER_S, 10 * NS_PER_MS, dtype=np.int64)
    ops = t_ns * done_per_s // NS_PER_S
    assert is_late(t_ns, ops, asked_per_s) is late


def test_a_backlog_that_is_worked_off_is_over() -> None:
    t_ns = np.arange(0, NS_PER_S, 10 * NS_PER_MS, dtype=np.int64)
    ops = np.minimum(t_ns * 3 // NS_PER_MS, 1000 + t_ns // NS_PER_MS)
    assert is_late(t_ns[:40], ops[:40], 1000.0)
    assert not is_late(t_ns, ops, 1000.0)
