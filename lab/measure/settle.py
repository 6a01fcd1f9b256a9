"""Wait for an even rate of the guest, before and after a snapshot."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from lab.analysis.slowdown import find_back, slowdown
from lab.instruments.progress import ProgressSampler
from lab.units import NS_PER_MS, NS_PER_S

# The guest's rate has settled when so many windows in a row lie within this share of each other.
SETTLE_WINDOW_S = 0.25
SETTLE_WINDOWS = 3
SETTLE_SHARE = 0.05
SETTLE_LIMIT_S = 8.0

# How long to wait for the old rate after completion, and how much to record of it once it is there.
TAIL_LIMIT_S = 5.0
TAIL_AFTER_BACK_S = 0.3
POLL_S = 0.1


def is_settled(t_ns: np.ndarray[Any, Any], ops: np.ndarray[Any, Any]) -> bool:
    """Whether the last windows of progress ran at one rate, within `SETTLE_SHARE` of the
    fastest.
    """
    width = round(SETTLE_WINDOW_S * NS_PER_S)
    if len(t_ns) < 2 or t_ns[-1] - t_ns[0] < SETTLE_WINDOWS * width:
        return False
    edges = t_ns[-1] - np.arange(SETTLE_WINDOWS, -1, -1) * width
    done = np.diff(np.interp(edges, t_ns, ops))
    return bool(done.min() > 0 and done.min() >= (1 - SETTLE_SHARE) * done.max())


async def settle(sampler: ProgressSampler) -> str | None:
    """Wait until the guest runs evenly; return a warning when it never does."""
    waited = 0.0
    while waited < SETTLE_LIMIT_S:
        await asyncio.sleep(POLL_S)
        waited += POLL_S
        df = sampler.df()
        if is_settled(df["t_ns"].to_numpy(), df["ops"].to_numpy()):
            return None
    return (
        f"the guest's rate had not settled to within {SETTLE_SHARE:.0%} after {SETTLE_LIMIT_S:g} s"
    )


async def record_tail(sampler: ProgressSampler, request_ns: int, end_ns: int) -> None:
    """Record on until the guest's old rate is back, or for `TAIL_LIMIT_S`."""
    waited = 0.0
    while waited < TAIL_LIMIT_S:
        await asyncio.sleep(POLL_S)
        waited += POLL_S
        df = sampler.df()
        baseline = slowdown(df, request_ns=request_ns, end_ns=end_ns).baseline_ops_per_s
        late = df[df["t_ns"] >= end_ns - 2 * NS_PER_MS]
        if baseline is None or len(late) < 2:
            continue
        capped = find_back(late["t_ns"].to_numpy(), late["ops"].to_numpy(), end_ns, baseline)[1]
        if not capped:
            await asyncio.sleep(TAIL_AFTER_BACK_S)
            return
