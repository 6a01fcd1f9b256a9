"""What a snapshot cost those who asked a server in the guest for work, from the table of their
requests (`lab.loads.table`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from hdrh.histogram import HdrHistogram
from hdrh.log import HistogramLogWriter

from lab.analysis.slowdown import BASELINE_NS, baseline_rate
from lab.errors import RunError
from lab.instruments.threads import thread_summary
from lab.loads.table import in_order, request_table
from lab.marks import Marks
from lab.stats import quantile
from lab.units import NS_PER_MS, NS_PER_S, NS_PER_US, Ns

AFTER_NS = 500 * NS_PER_MS
"""How long after the snapshot's end what happens to requests counts as its doing."""

BIN_MS = 10.0


@dataclass(frozen=True, kw_only=True)
class RequestSummary:
    """What a snapshot cost requests.  None where the recording cannot say.

    The window is from the snapshot's request until `AFTER_NS` after its end.  In the latencies of
    the window is every request that was outstanding at an instant of it, from when it was due until
    its reply: those that were under way when it began, too, and those that ended long after it.
    One that was not answered yet when the table was read is censored, and counts with how long it
    had lasted by then; where there are such, latencies are lower bounds.  Requests that the server
    answered with an error have no place in latencies, and are not done.

    The latencies of before are those of requests that were due in the second before the snapshot's
    request and done by then.

    Lost requests are those that would have been done in the window at the rate of before,
    `lab.analysis.slowdown.baseline_rate` of the completions, less those that were; negative when
    more were done.  With an open loop, requests that are made up for within the window are not
    lost.
    """

    window_ms: float
    requests: int | None = None
    requests_per_s_before: float | None = None
    lost_requests: float | None = None
    refused_requests: int | None = None
    censored_requests: int | None = None
    request_p50_us: float | None = None
    request_p99_us: float | None = None
    request_p999_us: float | None = None
    request_worst_ms: float | None = None
    request_worst_censored: bool | None = None
    request_p50_before_us: float | None = None
    request_p99_before_us: float | None = None
    request_p999_before_us: float | None = None
    request_worst_before_ms: float | None = None
    vmm_cpu_s: float | None = None


def _until_ns(table: pd.DataFrame) -> int:
    """The instant up to which the table says what happened."""
    if (until_ns := table.attrs.get("until_ns")) is not None:
        return int(until_ns)
    return int((table["due_ns"] + table["latency_ns"]).max()) if len(table) else 0


def _window(marks: Marks) -> tuple[int, int]:
    if marks.request_ns is None or marks.end_ns is None:
        raise ValueError("a snapshot that did not end has no window")
    return marks.request_ns, marks.end_ns + AFTER_NS


def _done_ns(table: pd.DataFrame) -> Ns:
    """When requests were done, of those that the server did."""
    done = table.loc[table["ok"], "done_ns"].to_numpy(dtype=np.int64)
    return np.sort(done)


def df_progress(table: pd.DataFrame) -> pd.DataFrame:
    """Requests that have been done as progress of the guest, as `lab.analysis.slowdown` takes it.

    Columns: t_ns, ops (done until then, errors not among them).  A row for each instant at which
    one was done, and one where the table ends.
    """
    t_ns, counts = np.unique(_done_ns(table), return_counts=True)
    ops = np.cumsum(counts, dtype=np.int64)
    until_ns = _until_ns(table)
    if len(t_ns) and until_ns > t_ns[-1]:
        t_ns, ops = np.append(t_ns, until_ns), np.append(ops, ops[-1])
    return pd.DataFrame({"t_ns": t_ns, "ops": ops})


def df_throughput(table: pd.DataFrame, marks: Marks, bin_ms: float = BIN_MS) -> pd.DataFrame:
    """Requests done against time.

    Columns: ms (middle of the bin, since the snapshot's request), requests, requests_per_s.  Bins
    are aligned to the snapshot's request, and only those between the first request that was due
    and the last instant that is in the table are there.  Errors are not counted.

    Raises ValueError when the snapshot was never asked for.
    """
    if marks.request_ns is None:
        raise ValueError("there was no snapshot to count time from")
    columns = ["ms", "requests", "requests_per_s"]
    if not len(table):
        return pd.DataFrame(columns=columns)
    width = round(bin_ms * NS_PER_MS)
    first = -((marks.request_ns - int(table["due_ns"].min())) // width)
    last = (_until_ns(table) - marks.request_ns) // width
    if last <= first:
        return pd.DataFrame(columns=columns)
    edges = marks.request_ns + np.arange(first, last + 1, dtype=np.int64) * width
    # A request that is done at an edge is in the bin that begins there.
    counts = np.diff(np.searchsorted(_done_ns(table), edges, side="left"))
    middle = (edges[:-1] - marks.request_ns) / NS_PER_MS + bin_ms / 2
    rate = counts / width * NS_PER_S
    return pd.DataFrame({"ms": middle, "requests": counts, "requests_per_s": rate})


def df_outstanding(table: pd.DataFrame, first_ns: int, last_ns: int) -> pd.DataFrame:
    """The requests that were outstanding at an instant between two, both included; those that the
    server answered with an error are not among them.
    """
    ended = table["done_ns"].fillna(np.iinfo(np.int64).max)
    chosen = (table["due_ns"] <= last_ns) & (ended >= first_ns) & (table["ok"] | table["censored"])
    return table[chosen]


def _percentiles(latency_ns: npt.NDArray[np.int64]) -> tuple[float | None, ...]:
    """p50, p99, p99.9 in us, and the worst in ms."""
    if not len(latency_ns):
        return None, None, None, None
    of = [quantile(latency_ns, q) / NS_PER_US for q in (0.5, 0.99, 0.999)]
    return *of, float(latency_ns.max()) / NS_PER_MS


def request_summary(
    table: pd.DataFrame, marks: Marks, threads: pd.DataFrame | None = None
) -> RequestSummary:
    """What the snapshot cost requests; `RequestSummary` says what each number is.

    :param table: requests from a second before the snapshot's request until half a second after
        its end; what it does not reach stays None.
    :param threads: times of QEMU's threads for `vmm_cpu_s`, which is that of all but the vCPUs: of
        `lab.instruments.threads.ThreadTimes` that was read when the window began and when it
        ended, `times.df(["during"])`.

    Raises ValueError when the snapshot did not end.
    """
    first_ns, last_ns = _window(marks)
    window_ms = (last_ns - first_ns) / NS_PER_MS
    cpu_ms = thread_summary(threads)["qemu_cpu_ms"]
    progress = df_progress(table)
    t_ns, ops = (progress[name].to_numpy(dtype=np.int64) for name in ("t_ns", "ops"))
    rate = baseline_rate(t_ns, ops, first_ns) if len(t_ns) > 1 else None
    done = table.loc[table["ok"] & (table["done_ns"] <= first_ns).fillna(False)]
    quiet = done.loc[done["due_ns"] >= first_ns - BASELINE_NS, "latency_ns"]
    before = _percentiles(quiet.to_numpy(dtype=np.int64))
    summary = RequestSummary(
        window_ms=window_ms,
        requests_per_s_before=rate,
        request_p50_before_us=before[0],
        request_p99_before_us=before[1],
        request_p999_before_us=before[2],
        request_worst_before_ms=before[3],
        vmm_cpu_s=None if cpu_ms is None else cpu_ms / 1e3,
    )
    if _until_ns(table) < last_ns:
        return summary
    ended_there = table["done_ns"].between(first_ns, last_ns).fillna(False)
    outstanding = df_outstanding(table, first_ns, last_ns)
    latency = outstanding["latency_ns"].to_numpy(dtype=np.int64)
    during = _percentiles(latency)
    worst = outstanding.iloc[int(latency.argmax())] if len(latency) else None
    completed = int((ended_there & table["ok"]).sum())
    return RequestSummary(
        **(
            vars(summary)
            | {
                "requests": len(outstanding),
                "lost_requests": None if rate is None else rate * window_ms / 1e3 - completed,
                "refused_requests": int((ended_there & ~table["ok"]).sum()),
                "censored_requests": int(outstanding["censored"].sum()),
                "request_p50_us": during[0],
                "request_p99_us": during[1],
                "request_p999_us": during[2],
                "request_worst_ms": during[3],
                "request_worst_censored": None if worst is None else bool(worst["censored"]),
            }
        )
    )


_VERSION = 1
_META = b"lab.requests"


class RequestsMeta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What has to be known to read packed requests.

    due_ns, until_ns: when the first was due, and the table's `until_ns`.
    done_from: what `done_ns` is stored relative to: "next", when the next request of the same
        connection was due, which in a closed loop is the same instant; or "sent".
    operations: the categories of the column `operation`.
    """

    due_ns: int
    until_ns: int
    done_from: Literal["next", "sent"]
    operations: list[str]


class _FileMeta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a file of requests says of itself; see `RequestsMeta`."""

    version: int
    due_ns: int
    until_ns: int
    done_from: Literal["next", "sent"]


def _done_base_ns(done_from: str, due_ns: Ns, sent_ns: Ns, client: Ns) -> Ns:
    if done_from == "sent":
        return sent_ns
    shifted = pd.Series(due_ns).groupby(client).shift(-1, fill_value=0)
    following: Ns = shifted.to_numpy(dtype=np.int64)
    return np.where(following == 0, due_ns, following)


def _since_same_client(values: Ns, client: Ns) -> Ns:
    before: Ns = pd.Series(values).groupby(client).shift(1, fill_value=0).to_numpy(dtype=np.int64)
    return values - before


def pack_requests(table: pd.DataFrame) -> tuple[pa.Table, RequestsMeta]:
    """Return a table of requests as differences of its times from what is nearest to them, which
    take little room, and what is needed to read them: `unpack_requests` does, to the nanosecond.

    Columns, as `lab.runs.columns` has them under `requests`: due_delta_ns, sent_delta_ns,
    done_delta_ns, client, operation, number_delta, ok.

    Raises ValueError when the table is not as `lab.loads.table` makes it.
    """
    until_ns = _until_ns(table)
    if not in_order(table, until_ns).equals(table):
        raise ValueError("rows or columns of the table are not in order")
    due = table["due_ns"].to_numpy(dtype=np.int64)
    sent = table["sent_ns"].fillna(0).to_numpy(dtype=np.int64)
    done = table["done_ns"].fillna(0).to_numpy(dtype=np.int64)
    if not np.array_equal(np.where(done == 0, until_ns, done) - due, table["latency_ns"]):
        raise ValueError("latencies of the table are not done less due")
    if not np.array_equal(done == 0, table["censored"]):
        raise ValueError("requests of the table are censored and done, or neither")
    client = table["client"].fillna(-1).to_numpy(dtype=np.int64)
    following = _done_base_ns("next", due, sent, client)
    done_from: Literal["next", "sent"] = (
        "next" if 2 * np.count_nonzero(done == following) > len(done) else "sent"
    )
    origin = int(due[0]) if len(due) else 0
    base = following if done_from == "next" else sent
    stored = pa.table(
        {
            "due_delta_ns": np.diff(due, prepend=origin),
            "sent_delta_ns": pa.array(sent - due, mask=sent == 0),
            "done_delta_ns": pa.array(done - base, mask=done == 0),
            "client": pa.array(client.astype(np.int32), mask=client < 0),
            "operation": pa.array(table["operation"].astype(str)).dictionary_encode(),
            "number_delta": _since_same_client(table["number"].to_numpy(dtype=np.int64), client),
            "ok": table["ok"].to_numpy(dtype=bool),
        }
    )
    meta = RequestsMeta(
        due_ns=origin, until_ns=until_ns, done_from=done_from, operations=_categories(table)
    )
    return stored, meta


def unpack_requests(stored: pa.Table, meta: RequestsMeta) -> pd.DataFrame:
    """Return the table that `pack_requests` was given."""

    def column(name: str) -> Ns:
        values: Ns = stored[name].fill_null(0).to_numpy().astype(np.int64)
        return values

    def is_null(name: str) -> npt.NDArray[np.bool_]:
        null: npt.NDArray[np.bool_] = stored[name].is_null().to_numpy()
        return null

    due = meta.due_ns + np.cumsum(column("due_delta_ns"), dtype=np.int64)
    sent = np.where(is_null("sent_delta_ns"), 0, due + column("sent_delta_ns"))
    client = np.where(is_null("client"), -1, column("client"))
    base = _done_base_ns(meta.done_from, due, sent, client)
    done = np.where(is_null("done_delta_ns"), 0, base + column("done_delta_ns"))
    number = pd.Series(column("number_delta")).groupby(client).cumsum().to_numpy(dtype=np.int64)
    return request_table(
        due_ns=due,
        sent_ns=sent,
        done_ns=done,
        client=np.where(client < 0, 0, client),
        operation=pd.Categorical(stored["operation"].to_pylist(), categories=meta.operations),
        number=number,
        ok=stored["ok"].to_numpy(),
        until_ns=meta.until_ns,
    )


def write_requests(path: Path, table: pd.DataFrame) -> None:
    """Write a table of requests into a Parquet file, every nanosecond of it.

    100,000 requests of a closed loop take some 150 kB, of an open loop, which has one more time
    that nothing foretells, 450 kB.

    Raises ValueError when the table is not as `lab.loads.table` makes it.
    """
    stored, packed = pack_requests(table)
    meta = _FileMeta(
        version=_VERSION,
        due_ns=packed.due_ns,
        until_ns=packed.until_ns,
        done_from=packed.done_from,
    )
    stored = stored.replace_schema_metadata(
        {
            _META: msgspec.json.encode(meta),
            b"operations": msgspec.json.encode(packed.operations),
        }
    )
    numbers = [name for name in stored.column_names if name not in ("operation", "ok")]
    pq.write_table(
        stored,
        path,
        compression="zstd",
        compression_level=19,
        use_dictionary=["operation"],
        column_encoding=dict.fromkeys(numbers, "BYTE_STREAM_SPLIT"),
        write_statistics=False,
    )


def _categories(table: pd.DataFrame) -> list[str]:
    return [str(name) for name in table["operation"].cat.categories]


def read_requests(path: Path) -> pd.DataFrame:
    """Read what `write_requests` wrote: the same table, to the nanosecond.

    :raise RunError: the file is unreadable, none of these, or written by a newer version.
    """
    try:
        stored = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise RunError(f"{path} is no table of requests: {error}") from error
    found = stored.schema.metadata or {}
    try:
        meta = msgspec.json.decode(found[_META], type=_FileMeta)
        operations = msgspec.json.decode(found[b"operations"], type=list[str])
    except (KeyError, msgspec.ValidationError, msgspec.DecodeError) as error:
        raise RunError(f"{path} is no table of requests that this version can read") from error
    if meta.version > _VERSION:
        raise RunError(f"{path} was written by a newer version", "use that version")
    return unpack_requests(
        stored,
        RequestsMeta(
            due_ns=meta.due_ns,
            until_ns=meta.until_ns,
            done_from=meta.done_from,
            operations=operations,
        ),
    )


HDR_DIGITS = 3
"""Significant digits that a HdrHistogram keeps of a latency."""

_HDR_HIGHEST_NS = 3600 * NS_PER_S


def write_hdr_log(path: Path, table: pd.DataFrame, interval_s: float = 1.0) -> None:
    """Write the latencies of a table of requests as an interval log of HdrHistogram (V2, log
    format 1.2), for the tools that read such logs.

    A histogram holds the latencies, in ns, of the requests that were done in its interval; times
    are seconds of CLOCK_MONOTONIC.  Lost in it: of a latency what is beyond three significant
    digits, of a request when it was done in its interval, which connection it was on, and whatever
    was not done or refused.  `Interval_Max` is in whole ms, as the library writes it.  The table in
    Parquet (`write_requests`) is exact.

    Raises ValueError when the interval is shorter than 1 ms, or a request took longer than an hour.
    """
    if not interval_s >= 0.001:
        raise ValueError(f"an interval of {interval_s} s")
    done = table.loc[table["ok"], ["done_ns", "latency_ns"]].astype("int64")
    if len(done) and int(done["latency_ns"].max()) > _HDR_HIGHEST_NS:
        raise ValueError("a request took longer than an hour")
    width = round(interval_s * NS_PER_S)
    origin = int(table["due_ns"].min()) if len(table) else 0
    with path.open("w", encoding="utf-8") as file:
        log = HistogramLogWriter(file)
        log.output_comment("[Latency of requests in ns; times are seconds of CLOCK_MONOTONIC]")
        log.output_log_format_version()
        log.output_comment(f"[StartTime: {origin / NS_PER_S:f} (seconds since boot)]")
        log.output_legend()
        if not len(done):
            return
        index = (done["done_ns"] - origin) // width
        groups = dict(tuple(done["latency_ns"].groupby(index)))
        # Without a gap: in an interval in which nothing was done, nothing is what to see.
        for number in range(int(index.max()) + 1):
            histogram = HdrHistogram(1, _HDR_HIGHEST_NS, HDR_DIGITS)
            if number in groups:
                values, counts = np.unique(groups[number].to_numpy(), return_counts=True)
                for value, count in zip(values.tolist(), counts.tolist(), strict=True):
                    histogram.record_value(value, count)
            start_s = (origin + number * width) / NS_PER_S
            log.output_interval_histogram(histogram, start_s, start_s + interval_s, NS_PER_MS)
