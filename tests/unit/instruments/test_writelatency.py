"""The histogram of durations: its buckets, what lies between two readings, its quantiles."""

import ctypes
import os

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.errors import GuestError
from lab.guests import protocol
from lab.guests.protocol import LATENCY_BUCKETS, PAGE_WORDS, LatencyPage, latency_bounds_ticks
from lab.instruments.writelatency import WriteLatency, quantile_ns, stall_summary

TICKS_PER_NS = 2.5


def latency_page(gpas: list[int], *, elapsed_ns: int = 1000) -> bytes:
    words = np.zeros(PAGE_WORDS, dtype="<u8")
    words[:6] = (
        protocol.LATENCY_MAGIC, LATENCY_BUCKETS,
        70, 30, 70 + int(elapsed_ns * TICKS_PER_NS), 30 + elapsed_ns,
    )  # fmt: skip
    words[16 : 16 + len(gpas)] = gpas
    return words.tobytes()


def durations(*rows: tuple[str, int, int, int]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["window", "low_ns", "high_ns", "ops"])


def test_buckets_are_contiguous_and_differ_by_a_64th_at_most() -> None:
    bounds = latency_bounds_ticks().astype(np.int64)
    width = np.diff(bounds)
    assert bounds[0] == 0
    assert (width > 0).all()
    assert (width[128:] * 64 <= bounds[128:-1]).all()
    assert (width[:128] == 1).all()


def test_the_latency_page_says_where_the_buckets_are_and_how_fast_the_counter_is() -> None:
    page = LatencyPage.decode(latency_page([4096, 8192, 12288, 16384, 20480]), 1)
    assert page.gpas == ((4096, 8192, 12288, 16384, 20480),)
    assert page.ticks_per_ns == TICKS_PER_NS


def test_a_counter_that_has_not_ticked_has_no_speed() -> None:
    assert LatencyPage.decode(latency_page([], elapsed_ns=0), 1).ticks_per_ns is None


@pytest.mark.parametrize(("word", "value"), [(0, 0), (1, 1)])
def test_a_page_that_is_not_a_latency_page_is_refused(word: int, value: int) -> None:
    words = np.frombuffer(latency_page([]), "<u8").copy()
    words[word] = value
    with pytest.raises(GuestError):
        LatencyPage.decode(words.tobytes(), 1)


def test_what_is_counted_between_two_readings_is_told_in_ns() -> None:
    # Another process's memory is read; this one's own does as well.
    page = ctypes.create_string_buffer(latency_page([]), 4096)
    counts = (ctypes.c_int64 * LATENCY_BUCKETS)()
    start = ctypes.addressof(counts)
    instrument = WriteLatency(
        os.getpid(), ctypes.addressof(page), [[start + 4096 * k for k in range(5)]]
    )
    counts[100] = 7
    instrument.read()
    counts[100], counts[130] = 8, 3
    instrument.read()
    counts[LATENCY_BUCKETS - 1] = 1
    instrument.read()
    table = instrument.df(["before", "during"])
    # Bucket 130 begins at (64 + 2) << 1 ticks and is two ticks wide.
    assert table[:2].to_numpy().tolist() == [["before", 40, 40, 1], ["before", 53, 54, 3]]
    assert table["window"].tolist() == ["before", "before", "during"]
    assert instrument.readings[0].t_ns <= instrument.readings[2].t_ns


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=50), st.sampled_from([0.5, 0.99, 1.0]))
def test_a_quantile_is_the_end_of_the_bucket_that_holds_it(values: list[int], q: float) -> None:
    table = durations(*[("during", v, v + 1, 1) for v in values])
    expected = sorted(values)[max(0, int(np.ceil(q * len(values) - 1e-9)) - 1)]
    assert quantile_ns(table, q) == expected + 1


def test_there_is_no_quantile_of_nothing() -> None:
    assert quantile_ns(durations(), 0.5) is None


def test_only_long_operations_between_request_and_completion_are_stalls() -> None:
    figures = stall_summary(
        durations(
            ("before", 9_000, 11_000, 50),
            ("during", 3_900, 4_000, 1000),
            ("during", 4_000, 4_100, 998),
            ("during", 90_000, 110_000, 2),
        )
    )
    assert figures["stalls"] == 1000
    assert figures["stall_sum_ms"] == pytest.approx(998 * 0.00405 + 2 * 0.1)
    assert (figures["stall_p50_us"], figures["stall_p99_us"]) == (4.1, 4.1)
    assert (figures["stall_p999_us"], figures["stall_max_us"]) == (110, 110)


def test_without_a_histogram_nothing_is_known_about_stalls() -> None:
    assert set(stall_summary(None).values()) == {None}


def test_a_guest_without_stalls_has_none_and_no_quantiles() -> None:
    figures = stall_summary(durations(("during", 100, 101, 5)))
    assert (figures["stalls"], figures["stall_sum_ms"]) == (0, 0)
    assert figures["stall_p50_us"] is None
