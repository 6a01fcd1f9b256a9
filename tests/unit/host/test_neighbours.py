"""A measurement knows whether it was alone."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from lab.analysis.warnings import warnings_of
from lab.figures.stamp import stamp_text
from lab.host.limits import Throttled
from lab.host.neighbours import ANOTHER_MEASUREMENT, neighbours
from lab.host.running import StrayQemu
from lab.measure.sample import held_back, held_back_warnings
from lab.runs.records import RunRecord
from lab.runs.sets import RunSet


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lab.host.neighbours.running_qemus", list)


def test_who_measures_alone_has_no_neighbours() -> None:
    for _ in range(2):
        with neighbours() as found:
            pass
        assert found.found == []


def test_two_that_overlap_know_of_each_other() -> None:
    with neighbours() as first:
        with neighbours() as second:
            pass
        with neighbours() as third:
            pass
    assert first.found == second.found == third.found == [ANOTHER_MEASUREMENT]
    with neighbours() as later:
        pass
    assert later.found == []


def test_another_process_that_was_killed_is_none(tmp_path: Path) -> None:
    program = (
        "from lab.host.neighbours import neighbours\n"
        "with neighbours():\n"
        "    print('measures', flush=True)\n"
        "    input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"LAB_CACHE": str(tmp_path / "cache")},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"measures\n"
        with neighbours() as beside:
            pass
        process.kill()
    assert ANOTHER_MEASUREMENT in beside.found
    with neighbours() as after:
        pass
    assert after.found == []


def test_guests_other_than_the_measured_one_are_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guests = [StrayQemu(pid=pid, name="lab-x", orphaned=False) for pid in (7, 8)]
    monkeypatch.setattr("lab.host.neighbours.running_qemus", lambda: guests)
    with neighbours(7) as found:
        pass
    assert found.found == ["another guest"]
    with neighbours() as found:
        pass
    assert found.found == ["2 other guests"]


def test_a_set_that_was_held_back_says_so_wherever_it_is_shown(
    make_synthetic_set: Callable[..., RunSet], make_record: Callable[..., RunRecord]
) -> None:
    """Field report F9."""
    made = make_synthetic_set(methods=("background",), repeats=2, finish=False)
    assert all(one.throttled is None and one.beside == [] for one in made)
    assert "held back" not in stamp_text(made)

    with neighbours() as beside:
        beside.note("another guest")
    for order, periods in ((2, 0), (3, 9)):
        throttled = Throttled(periods=30, throttled_periods=periods, throttled_ms=12.5)
        record = make_record(
            "background",
            order,
            host=msgspec.to_builtins(held_back(throttled, beside)),
            warnings=held_back_warnings(throttled, beside),
        )
        made.append(record, {})
    assert [one.throttled for one in made][2:] == [
        Throttled(periods=30, throttled_periods=0, throttled_ms=12.5),
        Throttled(periods=30, throttled_periods=9, throttled_ms=12.5),
    ]
    stamp = stamp_text(made)
    assert "held back by a CPU quota in 1 of 4 boots" in stamp
    assert "beside other measurements or guests in 2 of 4 boots" in stamp
    caveats = "\n".join(warnings_of(made))
    assert "a CPU quota held it back in 9 of 30 periods, for 12 ms" in caveats
    assert "it was measured beside another guest" in caveats
