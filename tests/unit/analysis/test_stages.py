"""Where an engine's time goes: stages of faults, phases, and the sums that the floor is."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from lab.analysis import stages as anatomy
from lab.analysis.floor import df_floor_medians
from lab.analysis.waits import df_waits_by_method
from lab.errors import RunError, UsageError
from lab.figures.faults import plot_fault_stages
from lab.figures.phases import plot_phase_times
from lab.figures.varied import plot_against, plot_varied
from lab.figures.waits import plot_waits
from lab.report.report import render_report
from lab.runs.cases import case_columns, df_runs
from lab.runs.sets import RunSet, load_set
from tests.support.paths import DATA

MakeSet = Callable[..., RunSet]


@pytest.fixture(scope="module")
def floor() -> RunSet:
    return load_set(DATA / "floor")


@pytest.fixture(autouse=True)
def close_figures() -> object:
    yield
    plt.close("all")


def test_the_stages_of_a_fault_add_up_to_its_latency(make_synthetic_set: MakeSet) -> None:
    one = make_synthetic_set().measured("live-rfc")[0]
    stages = anatomy.df_fault_stages([one])
    assert set(stages["stage"]) == set(anatomy.STAGES)
    faults = one.df_faults()
    seen = faults[faults["released_ns"] > 0]
    assert len(stages) == 3 * len(seen)
    assert len(seen) < len(faults)  # what somebody else released has no stages
    assert stages["us"].sum() == pytest.approx(seen["latency_ns"].sum() / 1e3)


def test_a_fault_nobody_queued_has_no_such_stage() -> None:
    """The engine `copy` serves a fault in the thread that reads it."""
    stages = anatomy.df_fault_stages(load_set(DATA / "first-light").measured("live"))
    assert set(stages["stage"]) == {"saved", "released"}


def test_sizes_that_a_set_gave_the_engine_are_those_of_its_floor(floor: RunSet) -> None:
    table = anatomy.df_against_floor(load_set(DATA / "engine-chunk"), floor)
    release = table[table["step"] == "release all of RAM"].set_index("chunk_kib")["floor_high_ms"]
    larger, default = release[8192], release[2048]
    assert larger < default
    # 128 pages is a size that the floor has not timed.
    assert math.isnan(float(release[512]))


def test_quantiles_of_stages_are_medians_over_boots() -> None:
    stages = pd.DataFrame(
        {
            "run": ["a"] * 3 + ["b"] * 3 + ["c"],
            "method": "m",
            "stage": "saved",
            "us": [1.0, 2.0, 3.0, 10.0, 20.0, 30.0, 5.0],
        }
    )
    (row,) = anatomy.df_stage_quantiles(stages).itertuples(index=False)
    assert (row.n, row.faults) == (3, 7)
    assert (row.p50_us, row.p99_us) == (5.0, 5.0)


def test_without_faults_and_phases_tables_are_empty(make_synthetic_set: MakeSet) -> None:
    runs = make_synthetic_set().measured("background")
    stages = anatomy.df_fault_stages(runs)
    assert stages.empty
    assert anatomy.df_stage_quantiles(stages).empty
    assert anatomy.df_phase_medians(runs).empty


def test_phases_come_in_their_order(make_synthetic_set: MakeSet) -> None:
    table = anatomy.df_phase_medians(make_synthetic_set().measured())
    assert list(table.index)[:3] == ["setup", "stop", "device-state"]
    assert list(table.index)[-1] == "sweep"
    assert table.loc["setup", "live-rfc"] == pytest.approx(1.0)


def test_the_floor_of_a_sweep_is_the_sum_of_what_is_in_it(floor: RunSet) -> None:
    recorded = load_set(DATA / "first-light")
    table = anatomy.df_against_floor(recorded, floor).query("method == 'live'").set_index("step")
    parts = table.iloc[:3]
    for column in ("floor_low_ms", "floor_high_ms"):
        whole = table.loc["sweep: all of these", column]
        assert whole == pytest.approx(parts[column].sum())
    assert parts["measured_ms"].isna().all()
    assert (table["floor_low_ms"] <= table["floor_high_ms"]).all()
    # By hand: 512 calls a GiB to release, and an image written in pieces of 2 MiB.
    medians = df_floor_medians(floor)
    release = medians[
        (medians["label"] == "release 512 pages, busy") & (medians["ram_kind"] == "anon-thp")
    ]
    calls = 1024 / 2
    assert table.loc["release all of RAM", "floor_high_ms"] == pytest.approx(
        calls * release["median_us"].iloc[0] / 1e3
    )
    write = medians[(medians["label"] == "write 2 MiB, fresh") & (medians["target"] == "image-dir")]
    image_mib = np.median([one.summary["image_bytes"] for one in recorded.measured("live")]) / 2**20
    assert table.loc["write the image", "floor_high_ms"] == pytest.approx(
        image_mib / 2 * write["median_us"].iloc[0] / 1e3
    )


def test_the_file_system_of_the_image_decides_which_floor_counts(floor: RunSet) -> None:
    recorded = load_set(DATA / "first-light")

    def floor_ms() -> float:
        table = anatomy.df_against_floor(recorded, floor).query("method == 'live'")
        return float(table.set_index("step")["floor_high_ms"]["write the image"])

    on_disk = floor_ms()
    for one in recorded:
        assert isinstance(one.record.host, dict)
        one.record.host["image_filesystem"] = "tmpfs"
    assert floor_ms() != on_disk


def test_an_engine_that_releases_page_by_page_has_a_floor_of_its_own(
    make_synthetic_set: MakeSet, floor: RunSet
) -> None:
    table = anatomy.df_against_floor(make_synthetic_set(), floor)
    assert set(table["method"]) == {"live-rfc"}
    assert "copy what is in it" not in set(table["step"])
    release = table[table["step"] == "release all of RAM"].iloc[0]
    assert release["floor_high_ms"] > release["floor_low_ms"] > 0
    readable = anatomy.df_against_floor_readable(table)
    assert list(readable["step"]) == list(table["step"])
    assert not readable.isna().any().any()


def test_what_the_floor_does_not_have_is_unknown_and_not_zero(floor: RunSet) -> None:
    prices = anatomy._Prices(df_floor_medians(floor))
    assert math.isnan(prices.us("unprotect", "sweep", "call", ram_kind="silk"))


@pytest.mark.parametrize(("wss_mib", "said"), [(32, False), (33, True)])
def test_of_a_working_set_that_the_buffer_holds_no_floor_is_said(
    wss_mib: int, said: bool, floor: RunSet
) -> None:
    small = load_set(DATA / "first-light")
    for one in small:
        one.summary["wss_mib"] = wss_mib
    table = anatomy.df_against_floor(small, floor)
    lost = table[(table["method"] == "live") & table["step"].str.endswith("lost work")]
    assert len(lost) == said
    anatomy.df_against_floor_readable(table)


def test_a_set_of_snapshots_is_no_floor(make_synthetic_set: MakeSet) -> None:
    made = make_synthetic_set()
    with pytest.raises(RunError, match="no floor"):
        anatomy.df_against_floor(made, made)


def test_the_figures_show_every_engine_that_says_something(make_synthetic_set: MakeSet) -> None:
    made = make_synthetic_set(repeats=3)
    ax = plot_phase_times(made)
    assert [label.get_text() for label in ax.get_yticklabels()][-1] == "sweep"
    axes = plot_fault_stages(made)
    assert [one.get_title(loc="left") for one in axes] == list(anatomy.STAGES)
    assert all(len(one.get_lines()) == 3 for one in axes)


def varied_runs() -> pd.DataFrame:
    rows = [
        {
            "method": "live",
            "chunk_kib": kib,
            "outcome": "ok",
            "warmup": False,
            "lost_work_ms": float(kib + boot - 257),
        }
        for kib in (2048, 256, 512)
        for boot in range(3)
    ]
    return pd.DataFrame(rows)


def test_a_varied_parameter_is_drawn_in_its_order_and_what_has_no_place_is_said() -> None:
    (ax,) = plot_varied(varied_runs(), "chunk_kib", ["lost_work_ms"])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["256", "512", "2048"]
    assert ax.get_title(loc="left") == "lost work ms (2 not shown)"
    line = ax.get_lines()[-1]
    assert np.asarray(line.get_ydata()).tolist() == [1.0, 256.0, 1792.0]


def test_no_limit_is_drawn_beyond_the_highest_one() -> None:
    rows = varied_runs().rename(columns={"chunk_kib": "storage_mib_per_s"})
    rows["storage_mib_per_s"] = rows["storage_mib_per_s"].replace(256, 0)
    (ax,) = plot_varied(rows, "storage_mib_per_s", ["lost_work_ms"])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["512", "2048", "unlimited"]
    numbers, no_limit = ax.get_lines()[-2:]
    assert np.asarray(numbers.get_ydata()).tolist() == [256.0, 1792.0]
    assert np.asarray(no_limit.get_xdata()).tolist() == [2]
    assert np.asarray(no_limit.get_ydata()).tolist() == [1.0]


def test_what_a_zero_stands_for_is_named_and_no_line_leads_to_it() -> None:
    """0 pages are as many as the engine chooses, which was drawn as the number 0."""
    rows = varied_runs().rename(columns={"chunk_kib": "fault_around_pages"})
    rows["fault_around_pages"] = rows["fault_around_pages"].replace(2048, 0)
    (ax,) = plot_varied(rows, "fault_around_pages", ["lost_work_ms"])
    names = [label.get_text() for label in ax.get_xticklabels()]
    assert names == ["automatic", "256", "512"]
    numbers, automatic = ax.get_lines()[-2:]
    assert np.asarray(numbers.get_xdata()).tolist() == [1, 2]
    assert np.asarray(automatic.get_xdata()).tolist() == [0]
    assert ax.get_xlabel() == "taken along with a fault, pages"


@pytest.mark.parametrize("dtype", ["object", "str", "category"])
def test_the_order_of_values_is_the_dimensions_whatever_pandas_keeps_them_as(dtype: Any) -> None:
    rows = varied_runs().rename(columns={"chunk_kib": "ram_kind"})
    kinds = {2048: "hugetlb", 256: "memfd", 512: "anon"}
    rows["ram_kind"] = rows["ram_kind"].map(kinds).astype(dtype)
    (ax,) = plot_varied(rows, "ram_kind", ["lost_work_ms"])
    names = [label.get_text() for label in ax.get_xticklabels()]
    assert names == ["anon", "memfd", "hugetlb"]
    # Nothing lies between two kinds of RAM.
    assert {line.get_linestyle() for line in ax.get_lines()} == {"None"}


def test_what_is_measured_is_drawn_against_a_number_on_log_scales() -> None:
    (ax,) = plot_against(varied_runs(), "chunk_kib", ["lost_work_ms"])
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.get_title(loc="left") == "lost work ms (2 not shown)"
    line = ax.get_lines()[-1]
    assert np.asarray(line.get_xdata()).tolist() == [256.0, 512.0, 2048.0]
    assert np.asarray(line.get_ydata()).tolist() == [1.0, 256.0, 1792.0]


def test_only_what_a_set_varied_can_be_drawn(make_synthetic_set: MakeSet) -> None:
    made = make_synthetic_set()
    (ax,) = plot_varied(made, "chunk_kib", ["lost_work_ms"])
    assert not ax.get_lines()
    assert [text.get_text() for text in ax.texts] == [
        "chunk_kib was not varied here (varied: nothing)"
    ]
    with pytest.raises(UsageError, match="there is no chunk_kb to draw"):
        plot_varied(made, "chunk_kb", ["lost_work_ms"])
    with pytest.raises(UsageError, match="there is no lost_work to draw"):
        plot_varied(made, "chunk_kib", ["lost_work"])


def test_tables_of_a_set_that_varied_nothing_have_no_more_columns(
    make_synthetic_set: MakeSet,
) -> None:
    made = make_synthetic_set()
    frame = df_runs(made)
    assert case_columns(frame) == made.case_columns == ["method"]
    assert "chunk_kib" not in frame


def test_what_a_set_varied_is_drawn_in_the_units_that_the_titles_name() -> None:
    recorded = load_set(DATA / "kvm-methods")
    shares, rates = plot_varied(recorded, "accel", ["rate_after_rebuild", "baseline_ops_per_s"])
    assert shares.get_title(loc="left") == "rate after rebuild %"
    assert rates.get_title(loc="left") == "baseline Mops/s"
    for ax, scale in ((shares, (20, 300)), (rates, (0.5, 100))):
        heights = np.concatenate([np.asarray(line.get_ydata()) for line in ax.get_lines()])
        assert scale[0] < heights.min() < heights.max() < scale[1]


def test_combinations_of_what_a_set_varied_get_a_look_each() -> None:
    recorded = load_set(DATA / "ram-kinds")
    axes = plot_varied(recorded, "ram_kind", ["pause_ms"])
    legend = axes[-1].get_legend()
    assert legend is not None
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [f"{m}, accel={a}" for m in ("live", "background") for a in ("tcg", "kvm")]


def test_the_wait_of_the_guest_is_drawn_beside_the_handlers_part_of_it() -> None:
    recorded = load_set(DATA / "kvm-faults")
    under_kvm = recorded.only(accel="kvm")
    cases = under_kvm.cases
    ax = plot_waits(under_kvm)
    assert [line.get_linestyle() for line in ax.get_lines()] == ["-", ":"] * len(cases)
    looks = [(line.get_color(), line.get_alpha()) for line in ax.get_lines()]
    assert looks[::2] == looks[1::2]
    assert len(set(looks)) == len(cases)
    waits = df_waits_by_method(recorded.measured())
    # Nearly every fault has the guest's own word, who waits longer than the handler works.
    logged = sum(int(one.df("faults")["vcpu"].notna().sum()) for one in recorded.measured())
    assert 0.8 * logged < len(waits) <= logged
    middle = waits.groupby("method")[["handler_us", "wait_us"]].median()
    assert (middle["wait_us"] > middle["handler_us"]).all()


def test_the_report_shows_the_waits_of_a_guest_that_noted_them_and_no_other() -> None:
    title = "What the guest waits for a page"
    assert title in render_report(load_set(DATA / "kvm-faults"))
    assert title not in render_report(load_set(DATA / "kvm-large"))
