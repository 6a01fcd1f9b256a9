"""How long the guest's operations took, as the guest sees it.

A writer that was asked to (`Workload.time_writes`) reads its time stamp counter before and after
each operation and counts the difference in a bucket of a log-linear histogram in its own memory.
The host reads the buckets from outside at the beginning and at the end of what it measures; what
lies between is the difference of two readings.

What is measured: one operation of the workload as a whole, three stores to a page and two to the
writer's own tables, of which any may wait for a protected page; and also what has nothing to do
with snapshots, such as the host running something else on the vCPU's CPU.  What is not: the pause,
because the guest's clock stops with the VM.  Resolution: 1/64 of the duration.

What it costs: on the development machine under TCG some 60 ns an operation (266 ns without it, 323
with it; medians of 5 interleaved boots each), so that the guest's baseline is another than without
it, and five pages a writer that are written all the time.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd

from lab.column import Column, Metric
from lab.errors import GuestError, UsageError
from lab.guests.protocol import LATENCY_BUCKETS, PAGE_BYTES, LatencyPage, latency_bounds_ticks
from lab.host.memory import RemoteWindow
from lab.instruments.instrument import WINDOWS, Found, Instrument, Moment, Step, Taken, Watched

TABLE = (
    Column(
        "window",
        "text",
        "",
        "`before`: from a second before the request; `during`: request until completion",
    ),
    Column("low_ns", "int64", "ns", "shortest duration of an operation that is counted here"),
    Column("high_ns", "int64", "ns", "duration from which on it is counted in the next bucket"),
    Column("ops", "int64", "1", "operations that took so long, summed over the guest's writers"),
)
COLUMNS = tuple(column.name for column in TABLE)

METRICS = (
    Metric(
        "stalls",
        "int64",
        "1",
        "guest operations between request and completion that took longer than 4 us by the "
        "guest's clock; null unless the guest timed them",
        title="stalls > 4 µs",
    ),
    Metric(
        "stall_sum_ms",
        "float64",
        "ms",
        "all of these together, summed over the guest's writers",
        title="stall sum ms",
    ),
    Metric("stall_p50_us", "float64", "us", "median of them", title="stall p50 µs"),
    Metric("stall_p99_us", "float64", "us", "99 % quantile of the same", title="stall p99 µs"),
    Metric("stall_p999_us", "float64", "us", "99.9 % quantile of the same", title="stall p99.9 µs"),
    Metric("stall_max_us", "float64", "us", "longest of the same", title="stall max µs"),
)


STALL_NS = 4_000
"""An operation that took longer was held up: undisturbed ones take less than a tenth of that."""


@dataclass(frozen=True)
class Reading:
    """The counts at one time, `t_ns` of CLOCK_MONOTONIC, summed over the writers."""

    t_ns: int
    ops: npt.NDArray[np.int64]


class WriteLatency:
    """The histograms of one running guest.

    :param pid: the QEMU process.
    :param page_address: where the latency page is in it.
    :param bucket_addresses: for each writer, where the pages of its buckets are.
    """

    def __init__(
        self, pid: int, page_address: int, bucket_addresses: Sequence[Sequence[int]]
    ) -> None:
        self._page = RemoteWindow(pid, page_address, PAGE_BYTES)
        self._buckets = [
            [RemoteWindow(pid, address, PAGE_BYTES) for address in of_thread]
            for of_thread in bucket_addresses
        ]
        self.readings: list[Reading] = []

    def read(self) -> None:
        """Append a reading.

        :raise HostError: when this process may not read the memory of that one.
        :raise GuestError: when there is nothing at the addresses.
        """
        t_ns = time.monotonic_ns()
        total = np.zeros(LATENCY_BUCKETS, np.int64)
        try:
            self._page.read()
            for of_thread in self._buckets:
                for window in of_thread:
                    window.read()
                total += np.concatenate([np.frombuffer(w.buffer, np.int64) for w in of_thread])
        except OSError as error:
            raise GuestError(f"the durations cannot be read: {error.strerror}") from error
        self.readings.append(Reading(t_ns, total))

    def df(self, windows: Sequence[str] = WINDOWS) -> pd.DataFrame:
        """Return what was counted between the readings, one window between each two.

        Columns: `window` its name; `low_ns` and `high_ns`, what the bucket holds, the latter not
        included; `ops` operations that took so long.  Buckets with no operation are left out.

        :param windows: a name for each window, oldest first.
        :raise GuestError: when the guest's clock has not ticked yet.
        """
        if len(windows) != len(self.readings) - 1:
            raise ValueError(f"{len(windows)} names for {len(self.readings)} readings")
        speed = LatencyPage.decode(bytes(self._page.buffer), len(self._buckets)).ticks_per_ns
        if not speed:
            raise GuestError("the guest's clock has not ticked", "measure for longer")
        bounds_ns = np.round(latency_bounds_ticks() / speed).astype(np.int64)
        parts = []
        for name, first, last in zip(windows, self.readings, self.readings[1:], strict=False):
            ops = last.ops - first.ops
            seen = np.flatnonzero(ops)
            parts.append(
                pd.DataFrame(
                    {
                        "window": name,
                        "low_ns": bounds_ns[seen],
                        "high_ns": bounds_ns[seen + 1],
                        "ops": ops[seen],
                    }
                )
            )
        return pd.concat(parts, ignore_index=True)


def quantile_ns(histogram: pd.DataFrame, q: float) -> float | None:
    """Return the `q` quantile of a window's operations; None when there are none.

    It is the end of the bucket that holds it, so that it is too large by 1/64 at most.
    """
    ordered = histogram.sort_values("low_ns")
    below = ordered["ops"].cumsum().to_numpy()
    if not len(below):
        return None
    # The least duration that a share of at least q does not exceed.
    rank = max(1, int(np.ceil(q * below[-1] - 1e-9)))
    return float(ordered["high_ns"].iloc[int(np.searchsorted(below, rank))])


_QUANTILES = {
    "stall_p50_us": 0.5,
    "stall_p99_us": 0.99,
    "stall_p999_us": 0.999,
    "stall_max_us": 1.0,
}


def stall_summary(durations: pd.DataFrame | None) -> dict[str, float | int | None]:
    """Fields stalls, stall_sum_ms and the quantiles of stalls of the summary line, from the window
    `during`; null without a histogram.
    """
    figures: dict[str, float | int | None] = dict.fromkeys(("stalls", "stall_sum_ms", *_QUANTILES))
    if durations is None:
        return figures
    stalls = durations[(durations["window"] == "during") & (durations["low_ns"] >= STALL_NS)]
    middle_ns = (stalls["low_ns"] + stalls["high_ns"]) / 2
    figures["stalls"] = int(stalls["ops"].sum())
    figures["stall_sum_ms"] = float((middle_ns * stalls["ops"]).sum() / 1e6)
    for name, q in _QUANTILES.items():
        value = quantile_ns(stalls, q)
        figures[name] = None if value is None else value / 1e3
    return figures


async def write_latency(vm: Watched) -> WriteLatency:
    """Return the reader of how long the guest's operations take.

    :raise UsageError: when the guest was not asked to time them.
    """
    progress = await vm.progress_page()
    if not progress.latency_gpa:
        raise UsageError("the guest does not time its operations", "boot with time_writes=True")
    address = await vm.host_address(progress.latency_gpa)
    page = LatencyPage.decode(vm.read_host(address, PAGE_BYTES), progress.threads)
    buckets = [[await vm.host_address(gpa) for gpa in of_thread] for of_thread in page.gpas]
    return WriteLatency(vm.pid, address, buckets)


class WriteLatencyInstrument(Instrument):
    """How long operations took, of a guest that times them: that is another workload."""

    title: ClassVar = "guest's clock"
    switch: ClassVar = "time_writes"
    tables: ClassVar = {"write_latency": TABLE}
    metrics: ClassVar = METRICS

    latency: WriteLatency

    def steps(self) -> Mapping[Moment, Step]:
        timed = (Moment.BASELINE, Moment.REQUEST, Moment.COMPLETED)
        return {Moment.READY: self._begin} | dict.fromkeys(timed, self._read)

    async def _begin(self) -> None:
        self.latency = await write_latency(self.vm)

    def _read(self) -> None:
        self.latency.read()

    def found(self, taken: Taken) -> Found:
        table = self.latency.df()
        return Found(tables={"write_latency": table}, figures=stall_summary(table))
