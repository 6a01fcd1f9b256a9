"""What a snapshot cost requests, computed from tables with a known answer; and tables on disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hdrh.histogram import HdrHistogram
from hdrh.log import HistogramLogReader
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.analysis.requests import (
    HDR_DIGITS,
    df_outstanding,
    df_progress,
    df_throughput,
    read_requests,
    request_summary,
    write_hdr_log,
    write_requests,
)
from lab.analysis.slowdown import slowdown
from lab.errors import RunError
from lab.loads.table import request_table
from lab.marks import Marks

MS = 1_000_000
US = 1_000
ORIGIN = 123_456_789_000_000_000  # far from 0, as after months of uptime
MARKS = Marks(request_ns=ORIGIN + 1500 * MS, end_ns=ORIGIN + 2000 * MS)
END_MS = 4000


def at(ms: float) -> int:
    return ORIGIN + round(ms * MS)


def table_of(
    rows: Sequence[tuple[float, float | None]], until_ms: float = END_MS, **changes: Any
) -> pd.DataFrame:
    """A table of requests that were due and done at these milliseconds; None is for never."""
    due = np.array([at(due) for due, _ in rows], dtype=np.int64)
    done = np.array([0 if done is None else at(done) for _, done in rows], dtype=np.int64)
    values: dict[str, Any] = {
        "due_ns": due,
        "sent_ns": due,
        "done_ns": done,
        "client": np.zeros(len(rows), dtype=np.int64),
        "operation": pd.Categorical(["SET"] * len(rows), categories=["SET", "GET"]),
        "number": np.zeros(len(rows), dtype=np.int64),
        "ok": done != 0,
        "until_ns": at(until_ms),
    }
    return request_table(**(values | changes))


def even(first_ms: int, last_ms: int, latency_ms: float = 0.5) -> list[tuple[float, float | None]]:
    """One request each millisecond."""
    return [(ms, ms + latency_ms) for ms in range(first_ms, last_ms)]


QUIET = even(0, END_MS - 1)


def test_an_undisturbed_server_loses_nothing() -> None:
    found = request_summary(table_of(QUIET), MARKS)
    assert found.window_ms == 1000
    assert found.requests_per_s_before == pytest.approx(1000, rel=1e-3)
    assert found.lost_requests == pytest.approx(0, abs=1.5)
    assert found.request_p50_us == found.request_p999_us == 500
    assert found.request_worst_ms == found.request_worst_before_ms == 0.5
    assert found.request_worst_censored is False
    assert found.refused_requests == found.censored_requests == 0
    assert found.vmm_cpu_s is None


def test_a_standstill_costs_what_was_due_in_it_and_makes_it_wait() -> None:
    # An open loop: what was due from 1600 to 1900 is done at 1900.
    rows = even(0, 1600) + [(ms, 1900) for ms in range(1600, 1900)] + even(1900, END_MS - 1)
    found = request_summary(table_of(rows), MARKS)
    assert found.request_worst_ms == 300
    assert found.lost_requests == pytest.approx(0, abs=1.5)
    assert found.request_p50_us == 500
    assert found.request_p99_us is not None
    assert found.request_p99_us > 280_000
    assert found.request_p99_before_us == 500


def test_what_was_not_made_is_lost() -> None:
    # A closed loop: one request waits, and others are not made meanwhile.
    rows = [*even(0, 1600), (1600, 1900), *even(1900, END_MS - 1)]
    found = request_summary(table_of(rows), MARKS)
    assert found.lost_requests == pytest.approx(299, abs=1.5)
    assert found.request_worst_ms == 300
    assert found.requests is not None
    assert found.requests == pytest.approx(1000 - 299, abs=2)


@pytest.mark.parametrize(
    ("row", "counts"),
    [
        ((1000, 1499.9), False),  # over before
        ((1000, 1500), True),  # done at the request
        ((1000, 3000), True),  # all the time
        ((2499, 3900), True),  # begun within half a second after the end
        ((2500, 3900), True),
        ((2500.1, 3900), False),
        ((2499, None), True),  # not done yet
    ],
)
def test_every_request_that_was_outstanding_in_the_window_counts(
    row: tuple[float, float | None], counts: bool
) -> None:
    table = table_of([row])
    assert len(df_outstanding(table, at(1500), at(2500))) == counts
    found = request_summary(table, MARKS)
    assert found.requests == counts
    last = END_MS if row[1] is None else row[1]
    assert found.request_worst_ms == (pytest.approx(last - row[0]) if counts else None)


def test_a_request_without_a_reply_is_the_worst_and_censored() -> None:
    found = request_summary(table_of([*QUIET, (1700, None)]), MARKS)
    assert found.request_worst_ms == END_MS - 1700
    assert found.request_worst_censored is True
    assert found.censored_requests == 1


def test_errors_are_counted_and_have_no_place_in_latencies() -> None:
    rows = [*QUIET, (1600.25, 2400)]
    ok = np.array([True] * len(QUIET) + [False])
    found = request_summary(table_of(rows, ok=ok), MARKS)
    assert found.refused_requests == 1
    assert found.request_worst_ms == 0.5
    assert found.requests == 1001


def test_a_recording_that_ends_too_early_or_begins_too_late_says_so() -> None:
    short = request_summary(table_of(even(0, 2000), until_ms=2400), MARKS)
    assert short.requests_per_s_before is not None
    assert short.requests is short.lost_requests is short.request_worst_ms is None
    late = request_summary(table_of(even(1400, END_MS - 1)), MARKS)
    assert late.requests_per_s_before is late.lost_requests is None
    assert late.request_worst_ms == 0.5
    empty = request_summary(table_of([]), MARKS)
    assert empty.requests == 0
    assert empty.request_p50_us is empty.lost_requests is None
    with pytest.raises(ValueError, match="did not end"):
        request_summary(table_of(QUIET), Marks(request_ns=at(1500)))


def test_the_cpu_time_of_qemu_leaves_out_its_vcpus() -> None:
    threads = pd.DataFrame(
        {
            "window": ["during"] * 3,
            "thread": ["vCPU 0", "main loop", "snapshot thread"],
            "cpu_ns": [10**9, 2 * 10**8, 10**8],
            "wait_ns": [0, 0, 0],
        }
    )
    assert request_summary(table_of(QUIET), MARKS, threads).vmm_cpu_s == pytest.approx(0.3)


def test_requests_are_progress_of_which_the_slowdown_is_computed() -> None:
    rows = [*even(0, 1600), (1600, 1900), *even(1900, END_MS - 1)]
    progress = df_progress(table_of(rows))
    assert progress["ops"].iloc[-1] == len(rows)
    assert progress["t_ns"].iloc[-1] == at(END_MS)
    cost = slowdown(progress, request_ns=at(1500), end_ns=at(2000))
    assert cost.lost_work_ms == pytest.approx(300, abs=2)


def test_throughput_counts_each_request_in_the_bin_it_was_done_in() -> None:
    rows = [*even(0, 1600), (1600, 1900), *even(1900, END_MS - 1)]
    found = df_throughput(table_of(rows), MARKS)
    assert (np.diff(found["ms"]) == 10).all()
    assert found["ms"].iloc[0] == -1495
    assert found["requests"].sum() == len(rows)
    standstill = found[found["ms"].between(100, 400)]
    assert standstill["requests"].sum() == 0
    # The one that waited is done at an edge: it is in the bin that begins there.
    assert found.loc[found["ms"] == 405, "requests"].item() == 11
    assert found.loc[found["ms"] == -5, "requests_per_s"].item() == 1000


def test_throughput_without_a_whole_bin_has_no_rows() -> None:
    assert len(df_throughput(table_of([]), MARKS)) == 0
    assert len(df_throughput(table_of([(1501, 1504)], until_ms=1508), MARKS)) == 0
    with pytest.raises(ValueError, match="no snapshot"):
        df_throughput(table_of(QUIET), Marks())


@st.composite
def tables(draw: st.DrawFn) -> pd.DataFrame:
    """Tables as load generators make them, and stranger ones."""
    n = draw(st.integers(0, 30))
    times = st.lists(st.integers(0, 10**10), min_size=n, max_size=n)
    due = ORIGIN + np.sort(np.array(draw(times), dtype=np.int64))
    state = np.array(draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), dtype=np.int64)
    sent = np.where(state > 0, due + np.array(draw(times), dtype=np.int64), 0)
    done = np.where(state > 1, sent + np.array(draw(times), dtype=np.int64), 0)
    client = np.array(draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), dtype=np.int64)
    if draw(st.booleans()):
        # A closed loop: each request is done when the next one of its connection is due.
        following = pd.Series(due).groupby(client).shift(-1, fill_value=0).to_numpy()
        sent, done = due.copy(), following.astype(np.int64)
    numbers = st.lists(st.integers(0, 2**62), min_size=n, max_size=n)
    names = draw(st.lists(st.sampled_from(["SET", "GET"]), min_size=n, max_size=n))
    return request_table(
        due_ns=due,
        sent_ns=sent,
        done_ns=done,
        client=client,
        operation=pd.Categorical(names, categories=["SET", "GET"]),
        number=np.array(draw(numbers), dtype=np.int64),
        ok=(done != 0) & (state != 2),
        until_ns=ORIGIN + draw(st.integers(4 * 10**10, 5 * 10**10)),
    )


@settings(max_examples=40)
@given(table=tables())
def test_a_table_on_disk_is_the_same_to_the_nanosecond(
    table: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("requests") / "requests.parquet"
    write_requests(path, table)
    found = read_requests(path)
    pd.testing.assert_frame_equal(found, table)
    assert found.attrs == table.attrs


def test_five_runs_of_a_closed_loop_take_less_than_a_megabyte(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    n, clients = 100_000, 50
    # A server that takes 100 us, give or take, for one request after the other.
    done = ORIGIN + np.cumsum(rng.normal(100 * US, 4 * US, n + clients).astype(np.int64))
    table = request_table(
        due_ns=done[:n],
        sent_ns=done[:n],
        done_ns=done[clients:],
        client=np.arange(n, dtype=np.int64) % clients,
        operation=pd.Categorical(["SET"] * n),
        number=np.zeros(n, dtype=np.int64),
        ok=np.ones(n, dtype=bool),
        until_ns=int(done[-1]),
    )
    write_requests(tmp_path / "requests.parquet", table)
    assert 5 * (tmp_path / "requests.parquet").stat().st_size < 1_000_000


def test_a_table_that_is_not_as_it_should_be_is_not_written(tmp_path: Path) -> None:
    table = table_of(QUIET[:5])
    path = tmp_path / "requests.parquet"
    for wrong in (
        table[::-1],
        table.drop(columns="ok"),
        table.assign(latency_ns=table["latency_ns"] + 1),
    ):
        with pytest.raises((ValueError, KeyError)):
            write_requests(path, wrong)
    assert not path.exists()


def test_a_file_that_is_something_else_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no table of requests"):
        read_requests(tmp_path / "missing.parquet")
    other = tmp_path / "other.parquet"
    other.write_bytes(b"PAR1 and more")
    with pytest.raises(RunError, match="no table of requests"):
        read_requests(other)
    pd.DataFrame({"ok": [True]}).to_parquet(other)
    with pytest.raises(RunError, match="no table of requests"):
        read_requests(other)


def intervals(path: Path) -> list[HdrHistogram]:
    """What HdrHistogram's own reader finds in a log."""
    reader = HistogramLogReader(str(path), HdrHistogram(1, 3600 * 10**9, HDR_DIGITS))
    try:
        return list(iter(reader.get_next_interval_histogram, None))
    finally:
        reader.close()


def test_an_interval_log_holds_every_latency_to_three_digits(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    latency = rng.lognormal(6, 1.5, 4000) / 1000
    rows = [(float(ms), ms + took) for ms, took in zip(range(4000), latency, strict=True)]
    # Of these a second is empty, and two are not in it: an error, and one that is not done.
    rows = [row for row in rows if not 1000 <= row[1] < 2000] + [(3900.5, 3901.0), (3999, None)]
    ok = np.array([True] * (len(rows) - 2) + [False, False])
    table = table_of(rows, until_ms=4200, ok=ok)
    path = tmp_path / "requests.hlog"
    write_hdr_log(path, table)
    found = intervals(path)
    done = table[table["ok"]].astype({"done_ns": "int64"})
    index = (done["done_ns"] - int(table["due_ns"].min())) // 10**9
    assert [histogram.get_total_count() for histogram in found] == [
        int((index == number).sum()) for number in range(int(index.max()) + 1)
    ]
    assert found[1].get_total_count() == 0
    for number, histogram in enumerate(found):
        wanted = np.sort(done.loc[index == number, "latency_ns"].to_numpy())
        values = [
            entry.value_iterated_to
            for entry in histogram.get_recorded_iterator()
            for _ in range(entry.count_at_value_iterated_to)
        ]
        assert np.allclose(values, wanted, rtol=10**-HDR_DIGITS, atol=1)
        assert histogram.get_start_time_stamp() == pytest.approx(
            (at(0) + number * 10**9) / MS, abs=1
        )
    text = path.read_text()
    assert "CLOCK_MONOTONIC" in text
    # V2, compressed.
    assert text.count(",HISTFAAA") == len(found)


def test_an_interval_log_of_nothing_is_read_as_nothing(tmp_path: Path) -> None:
    for rows in ([], [(1.0, None)]):
        write_hdr_log(tmp_path / "empty.hlog", table_of(rows))
        assert intervals(tmp_path / "empty.hlog") == []


def test_what_an_interval_log_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="longer than an hour"):
        write_hdr_log(tmp_path / "long.hlog", table_of([(0, 3_600_001)], until_ms=4e6))
    with pytest.raises(ValueError, match="an interval of"):
        write_hdr_log(tmp_path / "short.hlog", table_of(QUIET), interval_s=0)
