"""Figures draw what they are given.  What is checked is the data on the axes, never pixels."""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

import lab
from lab.analysis.faults import df_faults_by_method, fault_latency_ns, fault_summary
from lab.analysis.phases import df_phases_by_method
from lab.errors import UsageError
from lab.figures import figures, plots
from lab.runs.cases import df_runs
from lab.runs.sets import RunSet, load_set
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
    assert len({(plots.colour(m), plots.marker(m)) for m in METHODS}) == len(METHODS)
    assert len({(plots.colour(m), plots.dashes(m)) for m in METHODS}) == len(METHODS)
    assert plots.colour("of-another-lab") == plots.colour("of-another-lab")


def test_fault_latency_is_one_line_a_boot_that_ends_at_all_of_its_faults(
    make_synthetic_set: MakeSet,
) -> None:
    made = make_synthetic_set(repeats=3)
    ax = plots.plot_fault_latency(df_faults_by_method(made.measured()))
    lines = ax.get_lines()
    assert len(lines) == 3
    assert ax.get_xscale() == "log"
    faults = made.measured("live-rfc")[0].df_faults()
    assert len(np.asarray(lines[0].get_xdata())) == len(fault_latency_ns(faults))
    assert np.asarray(lines[0].get_ydata())[-1] == 1


def test_fault_figures_take_one_run_s_table_as_it_is(make_synthetic_set: MakeSet) -> None:
    faults = make_synthetic_set().measured("live-rfc")[0].df_faults()
    assert len(plots.plot_fault_latency(faults).get_lines()) == 1
    ax = plots.plot_fault_histogram(faults)
    drawn = sum(patch.get_height() for patch in ax.patches if hasattr(patch, "get_height"))
    assert drawn == len(fault_latency_ns(faults))
    p50 = fault_summary(faults)["fault_p50_us"]
    assert np.asarray(ax.get_lines()[0].get_xdata())[0] == p50


def test_figures_of_one_snapshot_need_no_preparation(make_synthetic_set: MakeSet) -> None:
    one = make_synthetic_set().measured("live-rfc")[0]
    assert lab.plot_fault_latency(one.df_faults()).get_legend_handles_labels()[1] == ["live-rfc"]
    alone, together = one.df_faults(), df_faults_by_method([one])
    axes = [lab.plot_faults_over_time(alone), lab.plot_faults_over_time(together)]
    for a, b in zip(*(ax.get_lines() for ax in axes), strict=True):
        assert a.get_label() == b.get_label()
        np.testing.assert_allclose(np.asarray(a.get_xydata()), np.asarray(b.get_xydata()))
    assert {ax.get_xlabel() for ax in axes} == {"since the request, ms"}
    assert "first fault" in lab.plot_faults_over_time(one.df("faults")).get_xlabel()
    pause = lab.plot_phases(one.df_phases())
    widths = [patch.get_width() for patch in pause.patches if hasattr(patch, "get_width")]
    assert sum(widths) == pytest.approx(2.0, abs=0.01)
    assert [text.get_text() for text in pause.get_yticklabels()] == ["live-rfc"]


def test_no_faults_make_an_empty_figure_not_an_error() -> None:
    empty = df_faults_by_method([])
    assert plots.plot_fault_latency(empty).get_lines() == []
    assert list(plots.plot_fault_histogram(empty).patches) == []
    assert plots.plot_faults_over_time(empty).get_lines() == []


def test_slowdown_marks_the_pause_and_names_each_run() -> None:
    rate = pd.DataFrame({"ms": [-5.0, 0.0, 5.0], "share": [1.0, 0.5, 1.0]})
    ax = plots.plot_rates({"live-rfc": rate, "other": rate}, pauses_ms={"live-rfc": (0.5, 2.5)})
    assert ax.get_legend_handles_labels()[1] == ["live-rfc", "other"]
    assert [0.5, 2.5] in [list(np.asarray(line.get_xdata())) for line in ax.get_lines()]
    assert list(np.asarray(ax.get_lines()[0].get_ydata())) == [100.0, 50.0, 100.0]


def test_slowdown_is_drawn_from_progress_tables_alone(make_synthetic_set: MakeSet) -> None:
    made = make_synthetic_set(repeats=2)
    first, second = made.measured("live-rfc")
    other = made.measured("migrate-to-file")[0]
    ax = lab.plot_slowdown(first.df_progress(), second.df_progress(), other.df_progress())
    labels = ["live-rfc", "live-rfc (2)", "migrate-to-file"]
    assert [line.get_label() for line in ax.get_lines() if line.get_label() in labels] == labels
    assert ax.get_legend_handles_labels()[1] == labels
    drawn = {line.get_label(): line for line in ax.get_lines()}
    assert drawn["live-rfc"].get_color() == drawn["live-rfc (2)"].get_color()
    ms = np.asarray(drawn["live-rfc"].get_xdata())
    percent = np.asarray(drawn["live-rfc"].get_ydata())
    assert percent[ms < 0].mean() == pytest.approx(100, rel=0.01)
    assert percent[(ms > 50) & (ms < 700)].mean() == pytest.approx(30, rel=0.02)
    # The bar of the pause: from the stop to the resume, in ms since the request.
    bars = [list(np.asarray(line.get_xdata())) for line in ax.get_lines()]
    assert [1.0, 181.0] in bars


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
    ax = plots.plot_phases(phases)
    assert ax.get_legend_handles_labels()[1] == ["stop", "device-state", "arm", "resume"]
    width = sum(patch.get_width() for patch in ax.patches if hasattr(patch, "get_width"))
    assert width == pytest.approx(2.0, abs=0.01)


def test_cost_shows_every_boot_and_no_warm_up(make_synthetic_set: MakeSet) -> None:
    made = make_synthetic_set(repeats=3)
    frame = df_runs(made)
    frame.loc[0, "warmup"] = True
    axes = plots.plot_cost(frame)
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
    lost = plots.plot_cost(frame)[2]
    hollow = [line for line in lost.get_lines() if line.get_fillstyle() == "none"]
    assert len(hollow) == 1


def test_the_stamp_says_boots_accelerator_host_and_build(make_synthetic_set: MakeSet) -> None:
    made = make_synthetic_set(repeats=3)
    text = plots.stamp_text(made)
    for part in (
        "n=3 boots per method",
        "tcg",
        "128 MiB RAM",
        "made up",
        "0.0.0 (synthetic)",
        made.name,
    ):
        assert part in text
    ax = plots.stamp(plots.plot_cost(df_runs(made))[0], text)
    figure = ax.get_figure()
    assert figure is not None
    assert "tcg" in figure.get_supxlabel()


def test_the_style_does_not_leak_into_the_process_unless_asked_for() -> None:
    before = mpl.rcParams["axes.titlelocation"]
    plots.plot_fault_latency(df_faults_by_method([]))
    assert mpl.rcParams["axes.titlelocation"] == before
    plots.use_style()
    assert mpl.rcParams["axes.titlelocation"] == "left"


def test_latency_against_the_queue_has_a_point_a_bin_of_depths() -> None:
    faults = pd.DataFrame(
        {
            "run": "a",
            "method": "live",
            "latency_us": [1.0, 2.0, 3.0, 10.0, 20.0, 30.0, np.nan],
            "queue_depth": [0, 0, 0, 4, 5, 7, 100],
        }
    )
    ax = plots.plot_faults_by_depth(faults)
    (line,) = ax.get_lines()
    assert np.asarray(line.get_xdata()).tolist() == [0, 4]
    assert np.asarray(line.get_ydata()).tolist() == [2.0, 20.0]


def test_the_page_map_has_a_point_a_fault_at_its_address(make_synthetic_set: MakeSet) -> None:
    faults = make_synthetic_set().measured("live-rfc")[0].df_faults()
    ax = plots.plot_page_map(faults)
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
    ax = plots.plot_stalls(stalls)
    before, during = ax.get_lines()
    assert np.asarray(before.get_ydata()).tolist() == [7]
    assert np.asarray(during.get_xdata()).tolist() == [1, 4, 8]
    assert np.asarray(during.get_ydata()).tolist() == [222, 22, 2]
    assert ax.get_legend_handles_labels()[1] == ["before", "live"]


def test_lost_work_is_set_against_a_guest_that_stood_still(make_synthetic_set: MakeSet) -> None:
    ax = plots.plot_lost_work(df_runs(make_synthetic_set(repeats=3)))
    *points, line = ax.get_lines()
    assert np.asarray(line.get_xdata()).tolist() == np.asarray(line.get_ydata()).tolist()
    assert sum(len(np.asarray(one.get_xdata())) for one in points) == 3 * len(points)


def test_of_the_boots_of_one_method_the_one_of_median_duration_is_thick(
    make_synthetic_set: MakeSet,
) -> None:
    made = make_synthetic_set(repeats=3)
    ax = figures.slowdown_boots_figure(made, "background")
    drawn = {line.get_label(): line for line in ax.get_lines()}
    boots = [drawn[one.name] for one in made.measured("background")]
    assert {line.get_color() for line in boots} == {plots.colour("background")}
    widest = max(boots, key=lambda line: line.get_linewidth())
    assert widest.get_label() == figures.typical_run(made, "background").name
    assert sorted(line.get_linewidth() for line in boots)[1] < widest.get_linewidth()


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
    with plots.styled():
        ax = plots.plot_phase_times(phases)
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
    styles = plots.case_styles(cases, with_dashes=with_dashes)
    for case, style in zip(cases, styles, strict=True):
        assert (style.colour, style.marker) == (
            plots.colour(case["method"]),
            plots.marker(case["method"]),
        )
    looks = {(s.colour, s.marker, s.dashes, s.strength) for s in styles}
    assert len(looks) == len(cases)


def test_the_look_of_a_case_follows_the_order_of_its_values_and_not_that_of_the_rows() -> None:
    cases = [{"method": "live", "ram_mib": mib} for mib in (4096, 512, 1024)]
    looks = [plots.case_styles(order) for order in (cases, cases[::-1])]
    assert looks[0] == looks[1][::-1]
    by_ram = dict(zip((4096, 512, 1024), looks[0], strict=True))
    assert by_ram[512].dashes == plots.dashes("live", 0)
    assert by_ram[4096].dashes == plots.dashes("live", 2)


def method_of(label: object) -> str | None:
    """The method that a legend or an axis names."""
    found = str(label).split(", ")[0].split(" (")[0]
    return found if found in METHODS else None


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


def every_figure(recorded: RunSet) -> Iterator[list[Axes]]:
    """The standard figures that a set has data for, and those of what it varied."""
    have = figures.available(recorded)
    yield figures.cost_figure(recorded)
    yield [figures.lost_work_figure(recorded)]
    if have["slowdown"]:
        yield figures.slowdown_figure(recorded)
    if have["faults"]:
        yield [figures.faults_figure(recorded)]
        yield [figures.depth_figure(recorded)]
        yield figures.stages_figure(recorded)
    if have["phases"]:
        yield [figures.phase_times_figure(recorded)]
    if have["stalls"]:
        yield [figures.stalls_figure(recorded)]
    if have["waits"]:
        yield [figures.waits_figure(recorded)]
    for name in recorded.varied:
        yield figures.varied_figure(recorded, name, ["pause_ms", "duration_ms"])
        if not DIMENSIONS[name].order:
            yield figures.against_figure(recorded, name, ["pause_ms", "duration_ms"])


@pytest.mark.parametrize("name", SETS)
def test_a_method_keeps_its_colour_and_marker_in_every_figure_of_every_set(name: str) -> None:
    recorded = load_set(DATA / name)
    seen = set()
    for axes in every_figure(recorded):
        found = list(looks_of(axes))
        for method, shade, shape in found:
            assert shade == plots.colour(method), (method, axes[0].get_title())
            # Lines have none, or `_` at their medians.
            assert shape in (plots.marker(method), "None", "_"), (method, axes[0].get_title())
        seen |= {method for method, _, _ in found}
        plt.close("all")
    assert seen == set(recorded.methods)


def test_a_figure_of_one_boot_per_method_says_so(make_synthetic_set: MakeSet) -> None:
    """Its stamp said "n=3 boots", of which it showed one."""
    made = make_synthetic_set(repeats=3)
    figure = figures.slowdown_figure(made)[0].get_figure()
    assert figure is not None
    assert "n=1 of 3 boots per method" in figure.get_supxlabel()
    every = figures.slowdown_boots_figure(made, "background").get_figure()
    assert every is not None
    assert "n=3 boots per method" in every.get_supxlabel()


def test_an_idle_guest_has_no_working_set_in_the_stamp() -> None:
    """It was "idle None MiB"."""
    text = plots.stamp_text(load_set(DATA / "known-faults"))
    assert "idle |" in text
    assert "None" not in text
