"""What a rebuild of huge pages was worth: rates as shares of that before the snapshot."""

import numpy as np
import pandas as pd
import pytest

from lab.instruments.hugepages import SUMMARY, Rebuilt, rebuild_summary
from lab.units import NS_PER_MS, NS_PER_S

REBUILT = Rebuilt(
    start_ns=5 * NS_PER_S,
    end_ns=5 * NS_PER_S + 40 * NS_PER_MS,
    before_bytes=2 << 20,
    after_bytes=258 << 20,
)


def progress() -> pd.DataFrame:
    """Half a million operations a second until the rebuild, none in it, a million afterwards."""
    t_ns = np.array([3 * NS_PER_S, REBUILT.start_ns, REBUILT.end_ns, REBUILT.end_ns + 2 * NS_PER_S])
    return pd.DataFrame({"t_ns": t_ns, "ops": [0, 1_000_000, 1_000_000, 3_000_000]})


def test_rates_are_those_of_the_seconds_around_the_rebuild() -> None:
    assert rebuild_summary(REBUILT, progress(), 2e6) == {
        "rebuild_ms": 40.0,
        "rebuilt_mib": 256.0,
        "rate_before_rebuild": pytest.approx(0.25),
        "rate_after_rebuild": pytest.approx(0.5),
    }


@pytest.mark.parametrize("baseline", [None, 0.0])
def test_without_a_rate_before_the_snapshot_there_is_no_share(baseline: float | None) -> None:
    summary = rebuild_summary(REBUILT, progress(), baseline)
    assert summary["rebuilt_mib"] == 256.0
    assert summary["rate_before_rebuild"] is None
    assert summary["rate_after_rebuild"] is None


def test_nothing_is_said_of_a_rebuild_that_nobody_asked_for() -> None:
    assert rebuild_summary(None, progress(), 2e6) == dict.fromkeys(SUMMARY)
