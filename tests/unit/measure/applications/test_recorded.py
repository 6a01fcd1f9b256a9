"""What is recorded of requests is what was, and tables and figures of a set say what is in it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hdrh.histogram import HdrHistogram
from hdrh.log import HistogramLogReader
from matplotlib import pyplot as plt

from lab.analysis.applications import (
    applications_notes,
    df_application_ratios,
    df_application_ratios_readable,
    df_applications,
    df_applications_readable,
    df_beside_published,
    df_requests,
    df_several_application_ratios,
    df_several_applications,
    lost_s,
    requests_of,
)
from lab.analysis.requests import AFTER_NS, request_summary
from lab.figures.applications import (
    plot_application_throughput,
    plot_request_latency,
    plot_requests,
    plot_worst_request,
)
from lab.measure.applications.sample import EXACT_BEFORE_NS, HDR_LOG, condensed
from lab.report.report import render_report
from lab.runs.sets import RunSet, load_set
from tests.unit.measure.applications.conftest import MS, REQUEST, SHAPES, made_up

MakeSet = Callable[..., RunSet]
FIGURES = (plot_application_throughput, plot_requests, plot_request_latency, plot_worst_request)


@pytest.mark.parametrize("method", SHAPES)
def test_of_the_window_every_request_is_stored_and_says_the_same(method: str) -> None:
    table, marks = made_up(np.random.default_rng(1), method)
    figures, tables, _ = condensed(table, marks)
    again = pd.DataFrame(tables["requests"])
    assert marks.end_ns is not None
    ended = table["done_ns"].fillna(np.iinfo(np.int64).max)
    first_ns, last_ns = REQUEST - EXACT_BEFORE_NS, marks.end_ns + AFTER_NS
    assert len(again) == ((table["due_ns"] <= last_ns) & (ended >= first_ns)).sum()
    whole = vars(request_summary(table, marks))
    assert {name: figures[name] for name in whole} == whole


def test_bins_count_every_request_from_two_seconds_before_to_two_after() -> None:
    table, marks = made_up(np.random.default_rng(1), "live")
    bins = condensed(table, marks)[1]["throughput"]
    assert (bins["bin"].min(), bins["bin"].max()) == (-200, 219)
    done = table.loc[table["ok"], "done_ns"]
    inside = (done >= REQUEST - 2000 * MS) & (done < REQUEST + 2200 * MS)
    assert bins["requests"].sum() == inside.sum()


def test_the_log_has_every_latency_that_was_recorded(tmp_path: Path) -> None:
    table, marks = made_up(np.random.default_rng(1), "live")
    path = tmp_path / HDR_LOG
    path.write_bytes(condensed(table, marks)[2][HDR_LOG])
    reader = HistogramLogReader(str(path), HdrHistogram(1, 3600 * 10**9, 3))
    total = 0
    while (interval := reader.get_next_interval_histogram()) is not None:
        total += interval.get_total_count()
    reader.input_file.close()
    done = table.loc[table["ok"]]
    around = (done["done_ns"] >= REQUEST - 2000 * MS) & (done["due_ns"] <= REQUEST + 2200 * MS)
    assert total == around.sum()


def test_a_sealed_set_gives_the_requests_back(make_application_set: MakeSet) -> None:
    made = make_application_set(rounds=2)
    found = load_set(made.path)
    assert found.record.status == "sealed"
    assert found.kind == "applications"
    for run in found:
        table, marks = made_up(np.random.default_rng(run.record.order), run.record.method)
        again = requests_of(run)
        columns = ["due_ns", "sent_ns", "done_ns", "latency_ns", "client", "ok", "censored"]
        same = table.merge(again, on=columns, how="inner")
        assert len(same) == len(again) > 0
        again_summary = request_summary(again, marks)
        for name in ("requests", "request_p99_us", "request_worst_ms", "censored_requests"):
            assert getattr(again_summary, name) == run.summary[name]


def test_medians_are_over_rounds_and_what_failed_is_left_out(
    make_application_set: MakeSet,
) -> None:
    made = make_application_set(rounds=3, fails="background")
    table = df_applications(made).set_index("method")
    assert list(table.index) == list(SHAPES)
    assert list(table["n"]) == [3, 2, 3]
    assert table.loc["background", "pause_ms"] == 400
    assert table["pause_ms"].isna().to_dict()["none"]
    worst = sorted(run.summary["request_worst_ms"] for run in made.measured("live"))
    assert table.loc["live", "request_worst_ms"] == worst[1]
    assert table.loc["live", "request_worst_ms_low"] == worst[0]
    readable = df_applications_readable(made)
    assert list(readable["method"]) == list(SHAPES)
    assert any("it was to fail" in sentence for sentence in applications_notes(made))


def test_live_is_set_against_what_is_there(make_application_set: MakeSet) -> None:
    made = make_application_set(rounds=4)
    found = df_application_ratios(made)
    # Of the others there is no sample.
    assert set(found["against"]) == {"background"}
    worst = found.set_index("metric").loc["request_worst_ms"]
    assert 0 < worst["low"] <= worst["ratio"] <= worst["high"] < 0.1
    assert worst["n"] == 4
    assert len(df_application_ratios_readable(made)) == 1


def test_several_sets_are_below_each_other_by_what_was_lost_in_seconds_of_work(
    make_application_set: MakeSet,
) -> None:
    made = make_application_set(rounds=3, fails="background")
    table = df_several_applications([made, made])
    assert list(table["method"]) == 2 * list(SHAPES)
    assert set(table["n"]) == {"3", "2"}
    assert table["application"].str.endswith("; 1024 MiB").all()
    assert list(table.loc[table["method"] == "background", "pause ms"]) == ["400", "400"]
    assert set(table.loc[table["method"] == "none", "pause ms"]) == {"-"}
    for run in made.measured("live"):
        (lost,) = lost_s([run])
        rate = run.summary["requests_per_s_before"]
        assert lost * rate == pytest.approx(run.summary["lost_requests"])
    ratios = df_several_application_ratios([made, made])
    assert list(ratios.columns[:3]) == ["application", "live / ...", "n"]
    assert len(ratios) == 2


def test_it_stands_beside_what_others_published(make_application_set: MakeSet) -> None:
    table = df_beside_published(make_application_set(rounds=1))
    assert list(table["method"][:3]) == list(SHAPES)
    assert len(table) == 5
    assert table["setting"].str.contains("TCG").sum() == 3


def test_requests_for_figures_are_counted_from_the_request(make_application_set: MakeSet) -> None:
    table = df_requests(make_application_set(rounds=1))
    assert set(table["method"]) == set(SHAPES)
    assert table["ms"].min() < -1000
    assert not table.loc[table["ms"] < -100, "during"].any()


@pytest.mark.parametrize("plot", FIGURES, ids=lambda plot: plot.__name__)
def test_figures_draw_a_set_and_say_so_where_there_is_nothing(
    plot: Callable[..., Any],
    make_application_set: MakeSet,
    make_synthetic_set: MakeSet,
) -> None:
    drawn = plot(make_application_set(rounds=2))
    axes = drawn if isinstance(drawn, list) else [drawn]
    assert axes
    assert all(ax.has_data() for ax in axes)
    empty = plot(make_synthetic_set())
    (ax,) = empty if isinstance(empty, list) else [empty]
    assert not ax.has_data()
    plt.close("all")


def test_the_report_of_a_set_has_its_tables_and_figures(make_application_set: MakeSet) -> None:
    page = render_report(make_application_set(rounds=2))
    assert "What an application feels" in page
    assert page.count("<img") == len(FIGURES)
    plt.close("all")
