"""What an instrument costs is told from boots with and without it, and from nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lab.analysis import instruments as overhead
from lab.errors import RunError
from lab.figures.instruments import plot_overhead, plot_sample_gaps
from lab.measure.campaign import measure
from lab.measure.ground import Ground
from lab.measure.sample import Sample
from lab.report.report import render_report
from lab.runs.cases import case_columns
from lab.runs.sets import RunSet, create_set
from lab.scenario.plan import Plan
from lab.scenario.scenario import Scenario

MakeSet = Callable[..., RunSet]
GROUND = Ground(host={}, binaries={"patched": {"version": "0", "build_id": "p"}, "guest": {}})
PLAN = Plan(
    methods=("live",),
    repeats=5,
    vary={"log_faults": (True, False), "time_threads": (True, False)},
)


class Costs:
    """A sampler whose fault log makes every snapshot a tenth longer, and nothing else matters."""

    def __init__(self) -> None:
        self.taken = 0

    async def __call__(self, scenario: Scenario, image: Path, **_options: Any) -> Sample:
        self.taken += 1
        duration_ms = 100.0 + self.taken % 5 / 100
        if scenario.instruments.log_faults:
            duration_ms *= 1.1
        figures: dict[str, Any] = {"duration_ms": duration_ms, "lost_work_ms": -1.0}
        if scenario.instruments.log_faults:
            figures["faults"] = 7
        if scenario.instruments.time_threads:
            figures["qemu_cpu_ms"] = 50.0
        return Sample(outcome="ok", figures=figures)


@pytest.fixture
async def measured(tmp_path: Path) -> RunSet:
    return await measure(PLAN, tmp_path / "set", image_dir=tmp_path, ground=GROUND, sampler=Costs())


async def test_each_instrument_is_judged_over_all_boots_with_and_without_it(
    measured: RunSet,
) -> None:
    table: Any = overhead.df_overhead(measured).set_index(["instrument", "metric"])
    log, threads = table.loc["fault log", "duration_ms"], table.loc["times of threads"]
    assert (log["n_without"], log["n_with"]) == (10, 10)
    assert log["ratio"] == pytest.approx(1.1, rel=1e-3)
    assert log["low"] <= log["ratio"] <= log["high"]
    assert log["p"] < 0.001
    # The other instrument changes less than boots differ, although half of them have the log.
    row = threads.loc["duration_ms"]
    assert abs(row["ratio"] - 1) <= row["noise"]
    readable = overhead.df_overhead_readable(overhead.df_overhead(measured))
    verdicts = {
        (row["instrument"], row["of"]): row["less than the noise"]
        for row in readable.to_dict("records")
    }
    assert verdicts["fault log", "duration ms"] == "no"
    assert verdicts["times of threads", "duration ms"] == "yes"
    # A ratio of what is not positive means nothing.
    assert verdicts["fault log", "lost work ms"] == "-"


async def test_what_an_instrument_finds_itself_says_nothing_about_its_cost(
    measured: RunSet,
) -> None:
    table = overhead.df_overhead(measured)
    found = set(zip(table["instrument"], table["metric"], strict=True))
    assert ("fault log", "faults") not in found
    assert ("times of threads", "qemu_cpu_ms") not in found
    assert ("fault log", "qemu_cpu_ms") in found


async def test_what_instruments_change_is_drawn_beside_the_noise(measured: RunSet) -> None:
    ax = plot_overhead(measured)
    labels = [label.get_text() for label in ax.get_yticklabels()]
    # A ratio that is not known has no place.
    assert "fault log: duration_ms" in labels
    assert "fault log: lost_work_ms" not in labels
    assert len(ax.patches) == len(labels)


def test_a_set_with_the_same_instruments_throughout_can_not_say(
    make_synthetic_set: MakeSet,
) -> None:
    made = make_synthetic_set()
    with pytest.raises(RunError, match="the same instruments throughout"):
        overhead.df_overhead(made)
    sampling = overhead.sampling_cost(made)
    assert case_columns(sampling) == made.case_columns
    assert len(sampling) == len(made.cases)
    # What the made-up samples say of themselves: 7 us each millisecond.
    assert sampling["read_us"].tolist() == pytest.approx([7.0] * len(made.cases))
    assert sampling["share"].tolist() == pytest.approx([0.7] * len(made.cases), rel=0.01)


async def test_the_report_says_what_instruments_cost_and_where_that_was_measured(
    measured: RunSet, make_synthetic_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "In this set" in render_report(measured)
    made = make_synthetic_set()
    monkeypatch.setattr(overhead, "RECORDED", measured.path)
    text = render_report(made)
    assert "Measured in another set, not in this one" in text
    assert "times of threads" in text
    monkeypatch.setattr(overhead, "RECORDED", measured.path / "nowhere")
    assert "Not measured in this set" in render_report(made)


def test_samples_are_as_far_apart_as_they_were_before_the_request(
    make_synthetic_set: MakeSet,
) -> None:
    made = make_synthetic_set(repeats=1)
    gaps = overhead.df_sample_gaps(made)
    assert set(gaps["run"]) == {one.name for one in made}
    assert set(gaps["interval_us"]) == {1000}
    for one in made:
        t_ns, request_ns = one.df_progress()["t_ns"], one.record.marks.request_ns
        assert request_ns is not None
        before = t_ns[(t_ns >= request_ns - 1_000_000_000) & (t_ns < request_ns)]
        own = gaps.loc[gaps["run"] == one.name, "gap_ms"]
        assert len(own) == len(before) - 1 > 100
        assert own.sum() == pytest.approx((before.iloc[-1] - before.iloc[0]) / 1e6)
    ax = plot_sample_gaps(made)
    assert len(ax.get_lines()) == len(made)
    assert ax.get_legend_handles_labels()[1] == ["every 1 ms"]
    for line in ax.get_lines():
        share = np.asarray(line.get_ydata())
        assert share[0] == 1
        assert (np.diff(share) < 0).all()


def test_a_set_without_samples_has_no_gaps(tmp_path: Path) -> None:
    made = create_set(tmp_path / "s", plan={}, host={}, binaries={}, lab={})
    assert overhead.df_sample_gaps(made).empty
    assert not plot_sample_gaps(made).get_lines()
