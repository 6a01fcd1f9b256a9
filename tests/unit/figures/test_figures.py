"""Figures draw what they are given.  What is checked is the data on the axes, never pixels."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import msgspec
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

import lab
from lab.analysis.faults import df_faults_by_method
from lab.analysis.phases import df_phases_by_method
from lab.analysis.slowdown import df_rate
from lab.errors import UsageError
from lab.figures import style
from lab.figures.applications import (
    plot_application_throughput,
    plot_request_latency,
    plot_requests,
    plot_worst_request,
)
from lab.figures.cost import plot_cost, plot_lost_work
from lab.figures.faults import (
    plot_fault_histogram,
    plot_fault_latency,
    plot_fault_stages,
    plot_faults_by_depth,
    plot_faults_over_time,
    plot_page_map,
)
from lab.figures.figure import Plot
from lab.figures.floor import plot_floor, plot_floor_bulk, plot_floor_faults
from lab.figures.instruments import plot_overhead, plot_sample_gaps
from lab.figures.phases import plot_phase_times, plot_phases
from lab.figures.speed import plot_slowdown, plot_slowdown_boots
from lab.figures.stamp import stamp_text, write_under
from lab.figures.varied import plot_against, plot_varied
from lab.figures.waits import plot_stalls, plot_waits
from lab.instruments.faultlog import fault_summary
from lab.runs.cases import df_runs
from lab.runs.sets import RunSet, create_set, load_set
from lab.scenario.applications import OTHER_METHODS
from lab.scenario.dimensions import DIMENSIONS
from lab.scenario.methods import METHODS
from tests.support.paths import DATA

MakeSet = Callable[..., RunSet]
_LIST = (DATA / "README.md").read_text(encoding="utf-8").split("\n## The sets\n")[1]
SETS = [
    name
    for name in re.findall(r"^\| `([\w-]+)` \|", _LIST.split("\n## ")[0], re.MULTILINE)
    if load_set(DATA / name, verify=False).kind != "floor"
]


@pytest.fixture(autouse=True)
def _no_window() -> Iterator[None]:
    with mpl.rc_context():
        mpl.use("agg")
        yield
    plt.close("all")


def test_methods_have_colours_and_markers_of_their_own() -> None:
    ways = [*METHODS, *OTHER_METHODS]
    assert len({(style.colour(m), style.marker(m)) for m in ways}) == len(ways)
    assert len({(style.colour(m), style.dashes(m)) for m in METHODS}) == len(METHODS)
    assert style.colour("of-another-lab") == style.colour("of-another-lab")


def test_fault_latency_is_one_line_a_boot_that_ends_at_all_of_its_faults(
    make_synthetic_set: MakeSet,
) -> None:
    made = make_synthetic_set(repeats=3)
    ax = plot_fault_latency(df_faults_by_method(made.measured()))
    lines = ax.get_lines()
    assert len(lines) == 3
    assert ax.get_xscale() == "log"
    faults = made.measured("live-rfc")[0].df_faults()
    assert len(np.asarray(lines[0].get_xdata())) == (faults["released_ns"] > 0).sum()
    assert np.asarray(lines[0].get_ydata())[-1] == 1


def test_fault_figures_take_one_run_s_table_as_it_is(make_synthetic_set: MakeSet) -> None:
    faults = make_synthetic_set().measured("live-rfc")[0].df_faults()
    assert len(plot_fault_latency(faults).get_lines()) == 1
    ax = plot_fault_histogram(faults)
    drawn = sum(patch.get_height() for patch in ax.patches if hasattr(patch, "get_height"))
    assert drawn == (faults["released_ns"] > 0).sum()
    p50 = fault_summary(faults)["fault_p50_us"]
    assert np.asarray(ax.get_lines()[0].get_xdata())[0] == p50


def test_figures_of_one_snapshot_need_no_preparation(make_synthetic_set: MakeSet) -> None:
    one = make_synthetic_set().measured("live-rfc")[0]
    assert lab.plot_fault_latency(one.df_faults()).get_legend_handles_labels()[1] == ["live-rfc"]
    (alone,) = lab.plot_faults_over_time(one.df_faults())
    faults = df_faults_by_method([one])
    drawn = np.concatenate([np.asarray(line.get_xydata()) for line in alone.get_lines()])
    known = faults[["ms", "latency_us"]].dropna().to_numpy()
    np.testing.assert_allclose(np.sort(drawn, axis=0), np.sort(known, axis=0))
    assert {line.get_label() for line in alone.get_lines()} <= set(faults["resolver"])
    assert alone.get_xlabel() == "since the request, ms"
    assert "first fault" in lab.plot_faults_over_time(one.df("faults"))[0].get_xlabel()
    pause = lab.plot_phases(one.df_phases())
    widths = [patch.get_width() for patch in pause.patches if hasattr(patch, "get_width")]
    assert sum(widths) == pytest.approx(2.0, abs=0.01)
    assert [text.get_text() for text in pause.get_yticklabels()] == ["live-rfc"]


def test_no_faults_make_an_empty_figure_not_an_error() -> None:
    empty = df_faults_by_method([])
    assert plot_fault_latency(empty).get_lines() == []
    assert list(plot_fault_histogram(empty).patches) == []
    assert plot_faults_over_time(empty)[0].get_lines() == []


def test_slowdown_is_drawn_from_progress_tables_alone_a_row_each(
    make_synthetic_set: MakeSet,
) -> None:
    made = make_synthetic_set(repeats=2)
    first, second = made.measured("live-rfc")
    other = made.measured("migrate-to-file")[0]
    axes = lab.plot_slowdown(first.df_progress(), second.df_progress(), other.df_progress())
    labels = ["live-rfc", "live-rfc (2)", "migrate-to-file"]
    lines = [next(line for line in ax.get_lines() if line.get_label() in labels) for ax in axes]
    assert [line.get_label() for line in lines] == labels
    assert [ax.texts[0].get_text() for ax in axes] == labels
    assert lines[0].get_color() == lines[1].get_color()
    ms = np.asarray(lines[0].get_xdata())
    percent = np.asarray(lines[0].get_ydata())
    assert percent[ms < 0].mean() == pytest.approx(100, rel=0.01)
    assert percent[(ms > 50) & (ms < 700)].mean() == pytest.approx(30, rel=0.02)
    # The band of the pause: from the stop to the resume, in ms since the request.
    bands = [patch for patch in axes[2].patches if isinstance(patch, Rectangle)]
    assert [(band.get_x(), band.get_x() + band.get_width()) for band in bands] == [(1.0, 181.0)]
    # What was lost is what the recording says, and stands at the right.
    for ax, run in zip(axes, (first, second, other), strict=True):
        assert ax.texts[1].get_text() == f"lost {run.summary['lost_work_ms']:,.0f} ms"


def test_slowdown_refuses_tables_that_can_not_tell(make_synthetic_set: MakeSet) -> None:
    one = make_synthetic_set().runs[0]
    with pytest.raises(UsageError, match="which snapshot"):
        lab.plot_slowdown(one.df("progress"))
    progress = one.df_progress()
    late = progress[progress["t_ns"] >= progress.attrs["request_ns"]]
    with pytest.raises(UsageError, match="too short"):
        lab.plot_slowdown(late)


def test_phases_of_the_pause_add_up_and_leave_out_what_the_guest_runs_through(
    make_synthetic_set: MakeSet,
) -> None:
    made = make_synthetic_set(repeats=1)
    phases = df_phases_by_method(made.measured())
    ax = plot_phases(phases)
    assert ax.get_legend_handles_labels()[1] == ["stop", "device-state", "arm", "resume"]
    width = sum(patch.get_width() for patch in ax.patches if hasattr(patch, "get_width"))
    assert width == pytest.approx(2.0, abs=0.01)


def test_cost_shows_every_boot_and_no_warm_up(make_synthetic_set: MakeSet) -> None:
    made = make_synthetic_set(repeats=3)
    frame = df_runs(made)
    frame.loc[0, "warmup"] = True
    axes = plot_cost(frame)
    assert [t.get_text() for t in axes[0].get_yticklabels()] == [
        "live-rfc",
        "background",
        "migrate-to-file",
    ]
    points = [len(np.asarray(line.get_xdata())) for line in axes[0].get_lines()[::2]]
    assert points == [2, 3, 3]


def test_lost_work_below_zero_is_shown_and_not_dropped(make_synthetic_set: MakeSet) -> None:
    frame = df_runs(make_synthetic_set(methods=("live-rfc",), repeats=3))
    frame.loc[1, "lost_work_ms"] = -3.0
    lost = plot_cost(frame)[2]
    hollow = [line for line in lost.get_lines() if line.get_fillstyle() == "none"]
    assert len(hollow) == 1


def test_the_stamp_says_boots_accelerator_host_and_build(make_synthetic_set: MakeSet) -> None:
    made = make_synthetic_set(repeats=3)
    text = stamp_text(made)
    for part in (
        "n=3 boots per method",
        "tcg",
        "128 MiB RAM",
        "made up",
        "0.0.0 (synthetic)",
        made.name,
    ):
        assert part in text
    ax = plot_cost(df_runs(made))[0]
    write_under(ax, stamp=text)
    figure = ax.get_figure()
    assert figure is not None
    assert "tcg" in figure.get_supxlabel()


def test_the_style_does_not_leak_into_the_process() -> None:
    before = mpl.rcParams["axes.titlelocation"]
    plot_fault_latency(df_faults_by_method([]))
    assert mpl.rcParams["axes.titlelocation"] == before


def test_latency_against_the_queue_has_a_point_a_bin_of_depths() -> None:
    faults = pd.DataFrame(
        {
            "run": "a",
            "method": "live",
            "latency_us": [1.0, 2.0, 3.0, 10.0, 20.0, 30.0, np.nan],
            "queue_depth": [0, 0, 0, 4, 5, 7, 100],
        }
    )
    ax = plot_faults_by_depth(faults)
    (line,) = ax.get_lines()
    assert np.asarray(line.get_xdata()).tolist() == [0, 4]
    assert np.asarray(line.get_ydata()).tolist() == [2.0, 20.0]


def test_the_page_map_has_a_point_a_fault_at_its_address(make_synthetic_set: MakeSet) -> None:
    faults = make_synthetic_set().measured("live-rfc")[0].df_faults()
    (ax,) = plot_page_map(faults)
    assert (
        sum(len(np.asarray(line.get_xdata())) for line in ax.get_lines()) == faults["gpa"].count()
    )
    assert ax.get_legend_handles_labels()[1] == ["snapshot-thread", "sweep"]
    assert ax.get_xlabel() == "since the request, ms"


def test_stalls_are_counted_from_the_longest_on_and_by_the_second() -> None:
    stalls = pd.DataFrame(
        {
            "run": "a",
            "method": "live",
            "window": ["before", "during", "during", "during"],
            "window_s": [1.0, 0.5, 0.5, 0.5],
            "low_ns": [1000, 1000, 4000, 8000],
            "high_ns": [2000, 2000, 8000, 16000],
            "ops": [7, 100, 10, 1],
        }
    )
    ax = plot_stalls(stalls)
    before, during = ax.get_lines()
    assert np.asarray(before.get_ydata()).tolist() == [7]
    assert np.asarray(during.get_xdata()).tolist() == [1, 4, 8]
    assert np.asarray(during.get_ydata()).tolist() == [222, 22, 2]
    assert ax.get_legend_handles_labels()[1] == ["before", "live"]


def test_lost_work_is_set_against_a_guest_that_stood_still(make_synthetic_set: MakeSet) -> None:
    ax = plot_lost_work(df_runs(make_synthetic_set(repeats=3)))
    *points, line = ax.get_lines()
    assert np.asarray(line.get_xdata()).tolist() == np.asarray(line.get_ydata()).tolist()
    assert sum(len(np.asarray(one.get_xdata())) for one in points) == 3 * len(points)


def test_of_the_boots_of_one_method_the_one_of_median_duration_is_thick(
    make_synthetic_set: MakeSet,
) -> None:
    made = make_synthetic_set(repeats=3)
    axes = plot_slowdown_boots(made)
    assert [ax.texts[0].get_text() for ax in axes] == made.cases
    for ax, case in zip(axes, made.cases, strict=True):
        boots = [line for line in ax.get_lines() if line.get_color() == style.colour(case)]
        assert len(boots) == 3
        thin, also_thin, thick = sorted(boots, key=lambda line: line.get_linewidth())
        assert thin.get_linewidth() == also_thin.get_linewidth() < thick.get_linewidth()
        typical = made.typical(case)
        longest_ms = max(run.summary["duration_ms"] for run in made.measured(case))
        request_ns = typical.record.marks.request_ns
        assert request_ns is not None
        rate = df_rate(
            typical.df_progress(),
            request_ns=request_ns,
            baseline_ops_per_s=typical.summary["baseline_ops_per_s"],
            bin_ms=max(2.0, longest_ms / 100),
        )
        np.testing.assert_allclose(np.asarray(thick.get_ydata()), 100 * rate["share"])


def test_a_legend_of_many_long_names_leaves_the_axes_their_room() -> None:
    """Found in the report on a set of 16 cases: the legend hid the curves."""
    phases = pd.DataFrame(
        {
            "method": "live-inline-mapped",
            "rate_ops_per_s": [1000 * k for k in range(16) for _ in range(2)],
            "rebuild_huge_pages": False,
            "run": [f"{k:03d}" for k in range(16) for _ in range(2)],
            "phase": pd.Categorical(["stop", "sweep"] * 16),
            "start_ms": [0.0, 1.0] * 16,
            "duration_ms": [0.5, 100.0] * 16,
        }
    )
    with style.styled():
        ax = plot_phase_times(phases)
    figure = ax.get_figure()
    assert figure is not None
    figure.canvas.draw()
    legend = ax.get_legend()
    assert legend is not None
    axes_box, legend_box = ax.get_window_extent(), legend.get_window_extent()
    assert legend_box.y1 < axes_box.y0
    assert legend_box.y0 >= 0
    assert axes_box.height > 200


CASES: dict[str, tuple[Any, ...]] = {
    "method": tuple(METHODS),
    "accel": ("tcg", "kvm"),
    "ram_kind": ("anon", "memfd", "file", "hugetlb"),
}


@pytest.mark.parametrize("names", [("method",), ("method", "accel"), tuple(CASES)], ids="+".join)
@pytest.mark.parametrize("with_dashes", [True, False], ids=["dashes", "strength"])
def test_cases_have_their_methods_colour_and_marker_and_no_two_are_alike(
    names: tuple[str, ...], *, with_dashes: bool
) -> None:
    values = itertools.product(*(CASES[name] for name in names))
    cases = [dict(zip(names, each, strict=True)) for each in values]
    styles = style.case_styles(cases, with_dashes=with_dashes)
    for case, look in zip(cases, styles, strict=True):
        assert (look.colour, look.marker) == (
            style.colour(case["method"]),
            style.marker(case["method"]),
        )
    looks = {(s.colour, s.marker, s.dashes, s.strength) for s in styles}
    assert len(looks) == len(cases)


def test_the_look_of_a_case_follows_the_order_of_its_values_and_not_that_of_the_rows() -> None:
    cases = [{"method": "live", "ram_mib": mib} for mib in (4096, 512, 1024)]
    looks = [style.case_styles(order) for order in (cases, cases[::-1])]
    assert looks[0] == looks[1][::-1]
    by_ram = dict(zip((4096, 512, 1024), looks[0], strict=True))
    assert by_ram[512].dashes == style.dashes("live", 0)
    assert by_ram[4096].dashes == style.dashes("live", 2)


def method_of(label: object) -> str | None:
    """The method that a legend or an axis names."""
    found = str(label).split(", ")[0].split(" (")[0]
    return found if found in (*METHODS, *OTHER_METHODS) else None


def looks_of(axes: Sequence[Axes]) -> Iterator[tuple[str, str, str]]:
    """Method, colour and marker of each line that a legend or an axis gives to a method."""
    for ax in axes:
        for line in ax.get_lines():
            if method := method_of(line.get_label()):
                yield method, str(line.get_color()), str(line.get_marker())
        rows = [method_of(label.get_text()) for label in ax.get_yticklabels()]
        for line in ax.get_lines() if any(rows) else ():
            heights = np.asarray(line.get_ydata())
            row = round(float(heights.mean())) if len(heights) else -1
            if line.get_transform() == ax.transData and 0 <= row < len(rows) and rows[row]:
                yield str(rows[row]), str(line.get_color()), str(line.get_marker())


FIGURES: Sequence[Plot[..., Any]] = (
    plot_cost,
    plot_lost_work,
    plot_slowdown,
    plot_slowdown_boots,
    plot_fault_latency,
    plot_fault_histogram,
    plot_fault_stages,
    plot_faults_by_depth,
    plot_faults_over_time,
    plot_page_map,
    plot_phases,
    plot_phase_times,
    plot_stalls,
    plot_waits,
    plot_overhead,
    plot_sample_gaps,
    plot_floor,
    plot_floor_bulk,
    plot_floor_faults,
    plot_application_throughput,
    plot_requests,
    plot_request_latency,
    plot_worst_request,
)
"""Every figure that a set alone is enough for."""


def every_figure(recorded: RunSet) -> Iterator[list[Axes]]:
    """The figures that a set has data for, and those of what it varied."""
    for plot in FIGURES:
        if plot.missing(recorded) is None:
            drawn = plot(recorded)
            yield drawn if isinstance(drawn, list) else [drawn]
    for name in recorded.varied:
        yield plot_varied(recorded, name, ["pause_ms", "duration_ms"])
        if not DIMENSIONS[name].order:
            yield plot_against(recorded, name, ["pause_ms", "duration_ms"])


@pytest.mark.parametrize("name", SETS)
def test_a_method_keeps_its_colour_and_marker_in_every_figure_of_every_set(name: str) -> None:
    recorded = load_set(DATA / name)
    seen = set()
    for axes in every_figure(recorded):
        found = list(looks_of(axes))
        for method, shade, shape in found:
            assert shade == style.colour(method), (method, axes[0].get_title())
            # Lines have none, or `_` at their medians.
            assert shape in (style.marker(method), "None", "_"), (method, axes[0].get_title())
        seen |= {method for method, _, _ in found}
        plt.close("all")
    assert seen == set(recorded.methods)


def under(drawn: Axes | list[Axes]) -> str:
    """What is written under a figure."""
    figure = (drawn[0] if isinstance(drawn, list) else drawn).get_figure()
    assert figure is not None
    return str(figure.get_supxlabel()).replace("\n", " ")


def test_a_figure_of_one_boot_per_method_says_so(make_synthetic_set: MakeSet) -> None:
    """Its stamp said "n=3 boots", of which it showed one."""
    made = make_synthetic_set(repeats=3)
    assert "n=1 of 3 boots per method" in under(plot_slowdown(made))
    assert "n=3 boots per method" in under(plot_slowdown_boots(made))


def test_an_idle_guest_has_no_working_set_in_the_stamp() -> None:
    """It was "idle None MiB"."""
    text = stamp_text(load_set(DATA / "known-faults"))
    assert "idle |" in text
    assert "None" not in text


@pytest.mark.parametrize("plot", FIGURES, ids=lambda plot: plot.__name__)
def test_a_figure_says_what_it_shows_and_what_not(plot: Plot[..., Any]) -> None:
    assert plot.text.title
    assert plot.text.caption.endswith(".")
    assert plot.text.limits.endswith(".")
    assert plot.text.below == f"{plot.text.caption} {plot.text.limits}"
    assert plot.__doc__


@pytest.mark.parametrize("plot", FIGURES, ids=lambda plot: plot.__name__)
def test_a_set_without_what_a_figure_needs_makes_empty_axes_that_say_so(
    plot: Plot[..., Any], tmp_path: Path
) -> None:
    made = create_set(tmp_path / "none", plan={}, host={}, binaries={}, lab={})
    drawn = plot(made)
    ax = drawn[0] if isinstance(drawn, list) else drawn
    assert [text.get_text() for text in ax.texts] == ["no run of none counts"]
    assert (ax.get_lines(), list(ax.patches)) == ([], [])
    assert ax.get_title(loc="left") == plot.text.title


def test_what_is_missing_is_named(make_synthetic_set: MakeSet) -> None:
    made = make_synthetic_set(methods=("background", "migrate-to-file"))
    for plot, what in (
        (plot_fault_latency, "a log of write faults"),
        (plot_phases, "phases that its engine told"),
        (plot_stalls, "a guest that timed its operations"),
        (plot_waits, "a guest that noted its slow writes and a log of write faults"),
    ):
        sentence = f"no run of {made.name} has {what}"
        assert plot.missing(made) == sentence
        assert [text.get_text() for text in plot(made).texts] == [sentence]
    for run in made:
        run.summary["lost_work_ms"] = None
    assert plot_lost_work.missing(made) == f"no run of {made.name} has lost work ms"


def test_a_set_is_drawn_as_its_table_is_and_has_caption_and_stamp(
    make_synthetic_set: MakeSet,
) -> None:
    made = make_synthetic_set(repeats=2)
    whole, table = plot_fault_latency(made), plot_fault_latency(df_faults_by_method(made))
    for a, b in zip(whole.get_lines(), table.get_lines(), strict=True):
        np.testing.assert_array_equal(np.asarray(a.get_xydata()), np.asarray(b.get_xydata()))
    assert whole.get_title(loc="left") == table.get_title(loc="left")
    assert under(whole).startswith(plot_fault_latency.text.below)
    assert "n=2 boots per method" in under(whole)
    assert under(table) == ""
    without = plot_fault_latency.without_caption(made)
    assert under(without).startswith("n=2 boots per method")
    # Axes of the caller may share their figure with others: nothing is written below.
    ax = plt.subplots()[1]
    assert plot_fault_latency(made, ax=ax) is ax
    assert under(ax) == ""


def test_one_snapshot_is_drawn_as_it_is(make_synthetic_set: MakeSet) -> None:
    made = make_synthetic_set()
    one, other = made.measured("live-rfc")[0], made.measured("background")[0]
    assert len(plot_fault_latency(one).get_lines()) == 1
    assert one.name in under(plot_fault_latency(one))
    (text,) = plot_fault_latency(other).texts
    assert "has no table 'faults'" in text.get_text()
    for plot in (plot_cost, plot_stalls):
        with pytest.raises(UsageError, match="alone has nothing for this figure"):
            plot(one)


def test_the_boot_that_is_shown_is_one_that_has_what_is_drawn(make_synthetic_set: MakeSet) -> None:
    made = make_synthetic_set(methods=("live-rfc",), repeats=3)
    typical = made.typical()
    without = {name: table for name, table in typical.record.tables.items() if name != "faults"}
    record = msgspec.structs.replace(typical.record, tables=without)
    lacking = dataclasses.replace(typical, record=record)
    some = made.of(lacking if run is typical else run for run in made)
    (ax,) = plot_faults_over_time(some)
    assert sum(len(np.asarray(line.get_xdata())) for line in ax.get_lines()) > 0
    assert "n=1 of 3 boots per method" in under([ax])


def test_warm_ups_and_failed_runs_are_in_no_figure(make_synthetic_set: MakeSet) -> None:
    made = make_synthetic_set(repeats=3)
    warm = msgspec.structs.replace(made.runs[0].record, warmup=True)
    runs = [dataclasses.replace(made.runs[0], record=warm), *made.runs[1:]]
    assert len(plot_fault_latency(made.of(runs)).get_lines()) == 2


def test_a_set_can_be_narrowed_to_what_is_to_be_drawn() -> None:
    recorded = load_set(DATA / "kvm-faults")
    under_kvm = recorded.only(accel="kvm")
    assert {run.dimensions["accel"] for run in under_kvm} == {"kvm"}
    assert 0 < len(under_kvm) < len(recorded)
    two = recorded.only(method=("live", "live-rfc"), accel="kvm")
    assert two.methods == ["live", "live-rfc"]
    # What the set did not vary has a value all the same.
    assert len(recorded.only(guest="micro")) == len(recorded)
    assert len(recorded.only(guest="linux")) == 0
    with pytest.raises(UsageError, match="there is no parameter"):
        recorded.only(acel="kvm")


def test_what_is_no_method_has_no_method_s_colour() -> None:
    assert not set(style.OTHER_COLOURS) & {style.colour(method) for method in METHODS}
    recorded = load_set(DATA / "first-light")
    bars = plot_phases(recorded).patches
    assert {to_hex(bar.get_facecolor()).upper() for bar in bars} <= set(style.OTHER_COLOURS)


@pytest.mark.parametrize(("low", "high"), [(174.0, 3716.0), (1.0, 2.0), (540.0, 560.0), (2.0, 9e6)])
def test_a_log_axis_has_two_numbers_or_more_and_none_in_powers(low: float, high: float) -> None:
    ax = plt.subplots()[1]
    style.log_axis(ax.xaxis, pd.Series([low, high]))
    figure = ax.get_figure()
    assert figure is not None
    figure.canvas.draw()
    labels = [
        label.get_text()
        for label in ax.get_xticklabels()
        if ax.get_xlim()[0] <= label.get_position()[0] <= ax.get_xlim()[1]
    ]
    assert len([text for text in labels if text]) >= 2
    assert not any("e+" in text or "10^" in text for text in labels)
    assert style.plain(1e6, 0) == "1,000,000"


def test_an_engine_that_has_nothing_to_do_in_a_phase_has_no_point_in_it() -> None:
    """Two readings of the clock stretched the axis by three decades."""
    ax = plot_phase_times(load_set(DATA / "first-light"))
    names = [label.get_text() for label in ax.get_yticklabels()]
    row = names.index("arm-ahead")
    points = [
        str(line.get_color())
        for line in ax.get_lines()
        if np.asarray(line.get_ydata()).size
        and round(float(np.asarray(line.get_ydata()).mean())) == row
    ]
    assert set(points) == {style.colour("live")}
    assert ax.get_xlim()[0] > 0.001


def test_bars_of_the_pause_stand_together_by_method() -> None:
    recorded = load_set(DATA / "first-light")
    ax = plot_phases(recorded)
    engines = [label.get_text() for label in ax.get_yticklabels()]
    assert engines == ["live", "live-rfc", "live-inline"]
    heights = sorted({round(bar.get_y(), 3) for bar in ax.patches if isinstance(bar, Rectangle)})
    gaps = np.diff(heights)
    boots = [len(recorded.measured(name)) for name in engines]
    assert (gaps > 1.1).nonzero()[0].tolist() == [boots[0] - 1, boots[0] + boots[1] - 1]


def test_images_of_one_size_have_no_panel() -> None:
    panels = plot_cost(load_set(DATA / "instruments"))
    assert [ax.get_title(loc="left") for ax in panels] == [
        "pause, ms",
        "duration, ms",
        "lost work, ms",
    ]
    assert plot_cost(load_set(DATA / "first-light"))[-1].get_title(loc="left") == "image, MiB"


def test_the_names_of_many_cases_leave_the_panels_their_room() -> None:
    """More than half of the width was names."""
    panels = plot_cost(load_set(DATA / "instruments"))
    figure = panels[0].get_figure()
    assert figure is not None
    figure.canvas.draw()
    width = sum(ax.get_window_extent().width for ax in panels)
    assert width > 0.6 * figure.bbox.width
    shown = {text.get_text() for text in panels[0].texts}
    assert {"yes", "no", "1000", "20000", "log faults"} <= shown


def test_operations_that_nothing_held_up_do_not_widen_the_axis() -> None:
    """Five decades of it were empty."""
    ax = plot_stalls(load_set(DATA / "kvm-faults"))
    drawn = np.concatenate([np.asarray(line.get_xdata()) for line in ax.get_lines()])
    assert drawn.min() >= 1
