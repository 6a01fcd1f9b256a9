"""One sample: one way to save a state under load, and what the requests felt."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from lab.analysis.requests import (
    AFTER_NS,
    BIN_MS,
    df_throughput,
    pack_requests,
    request_summary,
    write_hdr_log,
)
from lab.analysis.slowdown import BASELINE_NS
from lab.host.limits import ThrottleCount
from lab.host.neighbours import neighbours
from lab.host.workdir import private_folder
from lab.instruments.threads import timing_threads
from lab.marks import Marks
from lab.measure.applications.bench import Bench, settle_load
from lab.measure.applications.ways import way_of
from lab.measure.hostwarm import WarmMemory
from lab.measure.sample import (
    Sample,
    filesystem_of,
    held_back,
    held_back_warnings,
    no_garbage_collection,
)
from lab.scenario.applications import Turn
from lab.units import NS_PER_MS, NS_PER_S

AROUND_NS = 2 * NS_PER_S
"""So long before the request, and after the end, requests are recorded."""

MARGIN_NS = 100 * NS_PER_MS
"""And so much longer, so that all of it is there."""

EXACT_BEFORE_NS = BASELINE_NS + 50 * NS_PER_MS
"""From so long before the request until the end of the window each request is stored; of the rest,
how many were done in each 10 ms."""

HDR_LOG = "requests.hlog"


async def take_sample(bench: Bench, turn: Turn, image: Path, warm: WarmMemory) -> Sample:
    """Load the server, wait until it answers evenly, and save a state once.

    Figures: those of `lab.runs.columns.APPLICATION_FIELDS`.  Tables: `requests` (packed) and
    `throughput`.  Logs: the interval log of HdrHistogram of all that was recorded.

    :param image: where an image is written; it is removed.
    :raise LabError: what kept it from being taken.
    """
    vm, plan = bench.vm, bench.plan
    way = way_of(bench, turn.method, image)
    try:
        async with contextlib.AsyncExitStack() as stack:
            beside = stack.enter_context(neighbours(vm.pid))
            times = await stack.enter_async_context(timing_threads(vm))
            # Another one for each sample, and the same whenever the plan is measured.
            seed = plan.seed * 1_000_000 + turn.order + 1
            load = await stack.enter_async_context(bench.load(seed, bench.rate_per_s))
            unsettled = await settle_load(load, bench.rate_per_s)
            throttle = ThrottleCount(vm.pid)
            load_average = os.getloadavg()[0]
            with no_garbage_collection():
                await warm.hold(plan.ram_mib)
                await asyncio.sleep((AROUND_NS + MARGIN_NS) / NS_PER_S)
                warm.release()
                done = await way.run(times.read)
                assert done.marks.end_ns is not None
                await _until(done.marks.end_ns + AFTER_NS)
                times.read()
                await _until(done.marks.end_ns + AROUND_NS + MARGIN_NS)
            throttled = throttle.so_far()
        size = done.image_bytes if done.image_bytes is not None else await way.size()
    finally:
        await way.clean()
    figures, tables, logs = condensed(load.df(), done.marks, times.df(["during"]))
    figures |= {
        "asked_per_s": bench.rate_per_s,
        "pause_ms": _ms(done.marks.stop_ns, done.marks.resume_ns),
        "duration_ms": _ms(done.marks.request_ns, done.marks.end_ns),
        "image_bytes": size,
    }
    warnings = [unsettled] if unsettled else []
    return Sample(
        outcome="ok",
        figures=figures,
        marks=done.marks,
        tables=tables,
        logs=logs,
        host={
            "image_filesystem": filesystem_of(image.parent),
            "load_average": load_average,
            **held_back(throttled, beside),
        },
        warnings=(*warnings, *held_back_warnings(throttled, beside)),
    )


def condensed(
    table: pd.DataFrame, marks: Marks, threads: pd.DataFrame | None = None
) -> tuple[dict[str, Any], dict[str, pd.DataFrame], dict[str, bytes]]:
    """What is recorded of the requests of a sample: figures, tables and logs.

    :param table: what `lab.loads` recorded, from `AROUND_NS` before the request until as long
        after the end.
    :param threads: as `lab.analysis.requests.request_summary` takes it.
    """
    exact, meta = pack_requests(_exact(table, marks))
    figures = vars(request_summary(table, marks, threads)) | {"packed": msgspec.to_builtins(meta)}
    tables = {"requests": _frame(exact), "throughput": _binned(table, marks)}
    return figures, tables, {HDR_LOG: _hdr_log(table, marks)}


async def _until(t_ns: int) -> None:
    await asyncio.sleep(max(0, t_ns - time.monotonic_ns()) / NS_PER_S)


def _ms(first_ns: int | None, last_ns: int | None) -> float | None:
    return None if first_ns is None or last_ns is None else (last_ns - first_ns) / NS_PER_MS


def _between(table: pd.DataFrame, first_ns: int, last_ns: int) -> pd.DataFrame:
    """The requests that were outstanding, or refused, at an instant between two."""
    ended = table["done_ns"].fillna(np.iinfo(np.int64).max)
    found = table[(table["due_ns"] <= last_ns) & (ended >= first_ns)].reset_index(drop=True)
    found.attrs = dict(table.attrs)
    return found


def _exact(table: pd.DataFrame, marks: Marks) -> pd.DataFrame:
    assert marks.request_ns is not None
    assert marks.end_ns is not None
    return _between(table, marks.request_ns - EXACT_BEFORE_NS, marks.end_ns + AFTER_NS)


def _frame(packed: Any) -> pd.DataFrame:
    """The packed table with types that know what is missing."""
    frame: pd.DataFrame = packed.to_pandas(
        types_mapper=lambda kind: {"int64": pd.Int64Dtype(), "int32": pd.Int32Dtype()}.get(
            str(kind)
        )
    )
    return frame


def _binned(table: pd.DataFrame, marks: Marks) -> pd.DataFrame:
    """The table `throughput`."""
    assert marks.request_ns is not None
    assert marks.end_ns is not None
    around_ms = AROUND_NS / NS_PER_MS
    bins = df_throughput(table, marks)
    last_ms = (marks.end_ns - marks.request_ns) / NS_PER_MS + around_ms
    bins = bins[(bins["ms"] > -around_ms) & (bins["ms"] < last_ms)]
    return pd.DataFrame(
        {
            "bin": np.floor(bins["ms"].to_numpy(dtype=np.float64) / BIN_MS).astype(np.int32),
            "requests": bins["requests"].to_numpy(dtype=np.int32),
        }
    )


def _hdr_log(table: pd.DataFrame, marks: Marks) -> bytes:
    assert marks.request_ns is not None
    assert marks.end_ns is not None
    around = _between(table, marks.request_ns - AROUND_NS, marks.end_ns + AROUND_NS)
    with private_folder("lab-hdr-") as folder:
        path = folder / HDR_LOG
        write_hdr_log(path, around)
        return path.read_bytes()
