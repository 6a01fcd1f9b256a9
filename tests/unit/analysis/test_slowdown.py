"""What a snapshot cost the guest, computed from synthetic progress with a known answer."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.analysis.slowdown import Slowdown, df_rate, longest_gap_ns, lowest_rate, slowdown
from lab.analysis.waits import match_faults
from lab.instruments.faultlog import fault_summary
from lab.runs.cases import varying

MS = 1_000_000
RATE = 3_000_000  # operations a second
PER_MS = RATE // 1000
ORIGIN = 123_456_789_000_000_000  # far from 0, as after months of uptime


def progress(pieces: list[tuple[int, float]], period_ns: int = MS) -> pd.DataFrame:
    """Samples of a guest that runs `pieces` = (milliseconds, share of RATE) after each other."""
    edges_ms = np.concatenate([[0], np.cumsum([ms for ms, _ in pieces])])
    done = np.concatenate([[0], np.cumsum([ms * share * PER_MS for ms, share in pieces])])
    t = np.arange(0, int(edges_ms[-1]) * MS + 1, period_ns, dtype=np.int64)
    ops = np.floor(np.interp(t / MS, edges_ms, done) + 1e-6).astype(np.int64)
    return pd.DataFrame({"t_ns": t + ORIGIN, "ops": ops + 7, "read_ns": 7000})


def at(ms: float) -> int:
    return ORIGIN + round(ms * MS)


def test_an_undisturbed_guest_loses_nothing() -> None:
    df = progress([(3000, 1.0)])
    cost = slowdown(df, request_ns=at(1000), end_ns=at(1500))
    assert cost.baseline_ops_per_s == pytest.approx(RATE)
    assert cost.lost_work_ms == pytest.approx(0, abs=1e-3)
    assert cost.min_rate_50ms == pytest.approx(1)
    assert cost.max_gap_ms == 0
    assert cost.recovery_ms == 0
    assert cost.back_ns == at(1500)
    assert cost.back_capped is False


def test_a_hole_costs_its_length() -> None:
    df = progress([(1100, 1.0), (37, 0.0), (2000, 1.0)])
    cost = slowdown(df, request_ns=at(1000), end_ns=at(1500))
    assert cost.lost_work_ms == pytest.approx(37, abs=0.01)
    assert cost.max_gap_ms == pytest.approx(37)
    assert cost.min_rate_50ms == pytest.approx(13 / 50, abs=1e-3)
    assert cost.recovery_ms == 0


def test_half_speed_costs_half_the_time() -> None:
    df = progress([(1000, 1.0), (400, 0.5), (2000, 1.0)])
    cost = slowdown(df, request_ns=at(1000), end_ns=at(1400))
    assert cost.lost_work_ms == pytest.approx(200, abs=0.01)
    assert cost.min_rate_50ms == pytest.approx(0.5, abs=1e-3)
    assert cost.max_gap_ms == 0


def test_back_is_the_instant_from_which_200_ms_run_at_95_percent() -> None:
    # 300 ms at half speed after completion; the window may begin when 20 ms of it are left: 0.05
    # * 200 / 0.5
    df = progress([(1500, 1.0), (300, 0.5), (2000, 1.0)])
    cost = slowdown(df, request_ns=at(1200), end_ns=at(1500))
    assert cost.recovery_ms == pytest.approx(280, abs=0.01)
    assert cost.back_capped is False
    assert cost.lost_work_ms == pytest.approx(140, abs=0.01)


def test_a_guest_that_never_recovers_is_said_to_be_capped_at_the_end_of_the_recording() -> None:
    df = progress([(1500, 1.0), (1000, 0.8)])
    cost = slowdown(df, request_ns=at(1200), end_ns=at(1500))
    assert cost.back_capped is True
    assert cost.back_ns == at(2500)
    assert cost.recovery_ms == pytest.approx(1000)
    assert cost.lost_work_ms == pytest.approx(200, abs=0.01)


def test_a_tail_shorter_than_the_window_is_capped() -> None:
    df = progress([(1500, 1.0), (100, 1.0)])
    cost = slowdown(df, request_ns=at(1200), end_ns=at(1500))
    assert cost.back_capped is True
    assert cost.back_ns == at(1600)


def test_a_snapshot_shorter_than_50_ms_is_judged_by_the_50_ms_from_the_request() -> None:
    df = progress([(1010, 1.0), (10, 0.0), (2000, 1.0)])
    cost = slowdown(df, request_ns=at(1005), end_ns=at(1025))
    assert cost.min_rate_50ms == pytest.approx(0.8, abs=1e-3)


def test_slow_work_before_the_request_is_not_charged_to_the_snapshot() -> None:
    df = progress([(500, 1.0), (400, 0.0), (600, 1.0), (1500, 1.0)])
    cost = slowdown(df, request_ns=at(2000), end_ns=at(2100))
    assert cost.lost_work_ms == pytest.approx(0, abs=0.01)


def test_a_recording_that_cannot_say_says_nothing() -> None:
    df = progress([(100, 1.0), (2000, 1.0)])
    no_baseline = slowdown(df, request_ns=at(100), end_ns=at(300))
    assert no_baseline == Slowdown()
    cut_short = slowdown(df, request_ns=at(1000), end_ns=at(5000))
    assert cut_short.baseline_ops_per_s == pytest.approx(RATE)
    assert cut_short.lost_work_ms is None
    assert slowdown(df.iloc[:1], request_ns=at(0), end_ns=at(1)) == Slowdown()
    stopped = progress([(2000, 0.0), (1000, 1.0)])
    assert slowdown(stopped, request_ns=at(1500), end_ns=at(1600)).lost_work_ms is None


pieces = st.lists(st.tuples(st.integers(1, 400), st.floats(0, 1)), min_size=1, max_size=8)


@given(pieces)
def test_lost_work_is_the_integral_of_the_missing_rate(parts: list[tuple[int, float]]) -> None:
    length = sum(ms for ms, _ in parts)
    df = progress([(1000, 1.0), *parts, (1000, 1.0)])
    cost = slowdown(df, request_ns=at(1000), end_ns=at(1000 + length))
    expected = sum(ms * (1 - share) for ms, share in parts)
    assert cost.lost_work_ms == pytest.approx(expected, abs=0.02)
    assert cost.min_rate_50ms is not None
    assert -1e-6 <= cost.min_rate_50ms <= 1 + 1e-6


@given(pieces, st.integers(300_000, 3_000_000))
def test_figures_do_not_depend_on_when_the_sampler_looked(
    parts: list[tuple[int, float]], period_ns: int
) -> None:
    whole = [(1000, 1.0), *parts, (1000, 1.0)]
    length = sum(ms for ms, _ in parts)
    marks = {"request_ns": at(1000), "end_ns": at(1000 + length)}
    fine = slowdown(progress(whole), **marks)
    coarse = slowdown(progress(whole, period_ns), **marks)
    assert fine.lost_work_ms is not None
    # A sample interval that straddles a change of rate blurs it by at most itself.
    assert coarse.lost_work_ms == pytest.approx(fine.lost_work_ms, abs=2 * period_ns / MS + 0.05)


@given(st.lists(st.integers(0, 5000), min_size=30, max_size=120), st.data())
def test_lowest_window_is_no_higher_than_any_window_tried(
    steps: list[int], data: st.DataObject
) -> None:
    t = ORIGIN + np.arange(len(steps) + 1, dtype=np.int64) * 10 * MS
    ops = np.concatenate([[0], np.cumsum(steps)]).astype(np.int64)
    end = int(t[-1])
    lowest = lowest_rate(t, ops, ORIGIN, end)
    assert lowest is not None
    start = data.draw(st.integers(0, end - 50 * MS - ORIGIN))
    done = np.interp([start, start + 50 * MS], t - ORIGIN, ops)
    assert lowest <= (done[1] - done[0]) / 0.05 + 1e-3


def test_longest_gap_is_what_the_samples_prove() -> None:
    t = ORIGIN + np.arange(8, dtype=np.int64) * MS
    ops = np.array([0, 5, 5, 5, 9, 9, 12, 13])
    assert longest_gap_ns(t, ops, ORIGIN, int(t[-1])) == 2 * MS
    assert longest_gap_ns(t, ops, at(1.5), int(t[-1])) == round(1.5 * MS)
    assert longest_gap_ns(t, ops, at(3), int(t[-1])) == MS
    assert longest_gap_ns(t, np.arange(8), ORIGIN, int(t[-1])) == 0


def test_progress_that_counts_down_is_refused() -> None:
    df = progress([(2000, 1.0)])
    df.loc[1500, "ops"] = 0
    with pytest.raises(ValueError, match="count down"):
        slowdown(df, request_ns=at(1000), end_ns=at(1100))


def test_rate_bins_are_aligned_to_the_request_and_add_up() -> None:
    df = progress([(1003, 1.0), (50, 0.0), (947, 1.0)])
    rate = df_rate(df, request_ns=at(1003), baseline_ops_per_s=RATE, bin_ms=5)
    assert list(rate.columns) == ["ms", "ops_per_s", "share"]
    hole = rate[(rate["ms"] > 0) & (rate["ms"] < 50)]
    assert len(hole) == 10
    assert hole["share"].max() == pytest.approx(0, abs=1e-6)
    assert rate[(rate["ms"] < 0) | (rate["ms"] > 50)]["share"].to_numpy() == pytest.approx(
        1, abs=1e-3
    )
    assert all(b - a == pytest.approx(5) for a, b in pairwise(rate["ms"]))


def faults(latencies_ns: list[int]) -> pd.DataFrame:
    """A fault for each latency; latency 0 stands for a page that another thread released."""
    read = ORIGIN + np.arange(len(latencies_ns), dtype=np.int64) * 1000
    latency = np.array(latencies_ns, dtype=np.int64)
    return pd.DataFrame({"read_ns": read, "released_ns": np.where(latency > 0, read + latency, 0)})


def test_fault_quantiles_are_exact_and_leave_out_what_another_thread_released() -> None:
    # 101 faults seen released with 1..101 us, 6 that were not: a prime number of rows
    df = faults([k * 1000 for k in range(1, 102)] + [0] * 6)
    assert fault_summary(df) == {
        "faults": 107,
        "fault_p50_us": 51.0,
        "fault_p99_us": 100.0,
        "fault_max_us": 101.0,
    }


def test_no_fault_log_is_unknown_and_no_faults_is_none() -> None:
    assert set(fault_summary(None).values()) == {None}
    empty = fault_summary(faults([]))
    assert empty["faults"] == 0
    assert empty["fault_p50_us"] is None


def test_varying_names_only_dimensions_that_differ() -> None:
    rows = [{"method": "a", "ram_mib": 1024}, {"method": "b", "ram_mib": 1024}]
    assert varying(rows, ["method", "accel", "ram_mib"]) == ["method"]


def test_a_fault_is_matched_to_the_slow_write_on_its_page_that_is_nearest_in_time() -> None:
    shift_ns = 10**15
    faults = pd.DataFrame(
        {
            "seq": [0, 1, 2, 3],
            "offset": [4096, 8192, 12288, 4096],
            "vcpu": pd.array([0, 0, None, 0], dtype="Int64"),
            "read_ns": np.array([5_000, 9_000, 9_500, 900_000]) + shift_ns,
            "latency_ns": pd.array([2_000, None, 2_000, 3_000], dtype="Int64"),
        }
    )
    slow = pd.DataFrame(
        {
            "thread": 0,
            "op": [1, 2, 3, 4, 5],
            "offset": [4096, 8192, 4096, 16384, 12288],
            "start_ns": [1_000, 5_500, 895_000, 7_000, 5_500],
            "latency_ns": [11_000, 12_000, 13_000, 14_000, 15_000],
        }
    )
    matched = match_faults(faults, slow)
    # A fault of another thread than a vCPU's is nobody's operation.
    assert matched["seq"].tolist() == [0, 1, 3]
    assert matched["op"].tolist() == [1, 2, 3]
    assert matched["wait_ns"].tolist() == [11_000, 12_000, 13_000]
    assert len(match_faults(faults, slow[slow["op"] == 4])) == 0
