"""Where the time of an engine goes: its phases, the stages of a fault, and what the kernel alone
would ask for the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lab.analysis.floor import df_floor_medians
from lab.analysis.phases import df_phases_by_method
from lab.column import three_digits
from lab.runs.cases import by_case, case_columns, case_names, together
from lab.runs.run import Run
from lab.runs.sets import RunSet
from lab.scenario.dimensions import DIMENSIONS, recorded_dimension
from lab.scenario.engines import ENGINES, Sizes
from lab.stats import median, quantile, quantile_interval

STAGES: Mapping[str, str] = {
    "queued": "read by the handler until the snapshot thread takes it up",
    "saved": "from there until the page is in the stream or copied aside",
    "released": "from there until the call that releases it has returned",
}
"""What becomes of a fault, in order.  An engine that saves pages in the thread that reads faults
has no stage `queued`."""

_PAGES_PER_MIB = 256
_BUFFER_MIB = 32
"""The copy buffer's size by default; `lab measure` leaves it so."""


def df_fault_stages(runs: Iterable[Run]) -> pd.DataFrame:
    """How long each fault spent in each stage (`STAGES`).

    Columns: run, its case, stage, us.  Left out: faults on pages that were saved or
    released by somebody else meanwhile, faults before the pause (there is nothing to save), and
    runs without a fault log.
    """
    parts = []
    for one in (runs := together(runs)):
        if not one.has("faults"):
            continue
        faults = one.df_faults()
        faults = faults[(faults["saved_ns"] > 0) & (faults["released_ns"] > 0)]
        taken = faults["taken_ns"] > 0
        begun = faults["taken_ns"].where(taken, faults["read_ns"])
        stages = {
            "queued": (begun - faults["read_ns"])[taken],
            "saved": faults["saved_ns"] - begun,
            "released": faults["released_ns"] - faults["saved_ns"],
        }
        parts += [
            pd.DataFrame({"run": one.name, **one.case_values, "stage": stage, "us": ns / 1e3})
            for stage, ns in stages.items()
            if len(ns)
        ]
    columns = ["run", *case_names(runs), "stage", "us"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def df_stage_quantiles(stages: pd.DataFrame, q: Sequence[float] = (0.5, 0.99)) -> pd.DataFrame:
    """Quantiles of each stage: of every boot by itself, then the median over boots.

    :param stages: what `df_fault_stages` returned.

    Columns: the case, stage, n (boots), faults (in all of them), and a column `p50_us` and so on
    for each of `q`.  Quantiles of stages do not add up to those of the whole.
    """
    rows = []
    for case, of_case in by_case(stages):
        for stage, part in of_case.groupby("stage", sort=False):
            boots = [boot["us"].to_numpy(dtype=float) for _, boot in part.groupby("run")]
            row: dict[str, Any] = {**case, "stage": stage, "n": len(boots), "faults": len(part)}
            row |= {f"p{100 * x:g}_us": median([quantile(us, x) for us in boots]) for x in q}
            rows.append(row)
    names = [f"p{100 * x:g}_us" for x in q]
    return pd.DataFrame(rows, columns=[*case_columns(stages), "stage", "n", "faults", *names])


def df_phase_medians(runs: Iterable[Run]) -> pd.DataFrame:
    """Median over boots of how long each phase took, in ms.

    Index: phase, in the order in which they begin; one column per case, NA where its engine has no
    such phase.
    """
    phases = df_phases_by_method(runs)
    # Where two engines have different phases, the earlier one in the snapshot comes first.
    order = phases.groupby("phase")["start_ms"].median().sort_values().index
    names = case_columns(phases)
    medians = {
        tuple(case.values()): part.groupby("phase")["duration_ms"].median()
        for case, part in by_case(phases)
    }
    columns = pd.MultiIndex.from_frame(pd.DataFrame(list(medians), columns=names))
    table = pd.DataFrame(dict(enumerate(medians.values())), index=order)
    table.columns = columns if len(names) > 1 else columns.get_level_values(0)
    return table


@dataclass(frozen=True, kw_only=True)
class _Steps:
    """How an engine works: pages it releases with one call, while it sweeps and because of a
    fault.
    """

    sweep_pages: int
    fault_pages: int


def _steps_of(one: Run) -> _Steps | None:
    """Return how the engine of a run works; None for a run with no such engine."""
    engine = ENGINES.get(one.summary.get("engine") or "")
    if engine is None:
        return None
    names = ("chunk_kib", "fault_around_pages")
    recorded = {name: int(recorded_dimension(one.record.scenario, name)) for name in names}
    sizes = Sizes(**recorded)
    return _Steps(sweep_pages=engine.sweep_pages(sizes), fault_pages=engine.fault_pages(sizes))


def df_against_floor(run_set: RunSet, floor: RunSet) -> pd.DataFrame:
    """What the kernel alone asks for an engine's steps, beside what the engine took for them.

    One row per case and step.  Columns: the case, step, floor_low_ms and floor_high_ms (the floor
    while nothing else runs, and while a thread of the same process does: the truth of a guest that
    writes and waits in turn lies between), measured_ms (median over boots), measured_low_ms,
    measured_high_ms (its interval), n (boots).  `measured` is NA where the engine does not time the
    step by itself.

    The floor of a step is its median in `floor` for anonymous memory, times how much the snapshot
    did of it: pages released of all RAM, bytes written and copied of the image.  The steps of a
    sweep are done one after the other by one thread, so their sum is its floor.  NaN where `floor`
    has not timed calls of the engine's size.

    :raise RunError: when `floor` is none.
    """
    prices = _Prices(df_floor_medians(floor))
    rows: list[dict[str, Any]] = []
    for case in run_set.cases:
        runs = [one for one in run_set.measured(case) if one.has("phases")]
        steps = _steps_of(runs[0]) if runs else None
        if steps is not None:
            rows += [{**runs[0].case_values, **row} for row in _rows(runs, steps, prices)]
    names = ("floor_low_ms", "floor_high_ms", "measured_ms", "measured_low_ms", "measured_high_ms")
    return pd.DataFrame(rows, columns=[*run_set.case_columns, "step", *names, "n"])


def df_floor_steps(floor: RunSet) -> pd.DataFrame:
    """The rows of `df_floor_medians` for one call of each step that `df_against_floor` counts:
    releasing up to a huge page, copying, writing.

    :raise RunError: when `floor` is none.
    """
    medians = df_floor_medians(floor)
    release = (medians["benchmark"] == "unprotect") & (medians["ram_kind"] == "anon-thp")
    release &= medians["pages"] <= 2 * _PAGES_PER_MIB
    copy = (medians["benchmark"] == "copy") & (medians["ram_kind"] == "anon-thp")
    write = (medians["stage"] == "write") & (medians["variant"] == "fresh")
    return medians[release | copy | write].reset_index(drop=True)


class _Prices:
    """Medians of a floor set, looked up; NaN for what it does not have."""

    def __init__(self, medians: pd.DataFrame) -> None:
        self._medians = medians

    def us(self, benchmark: str, variant: str, stage: str, **keys: Any) -> float:
        rows = self._medians
        keys = {
            "benchmark": benchmark,
            "variant": variant,
            "stage": stage,
            "busy_threads": 0,
        } | keys
        for name, value in keys.items():
            rows = rows[rows[name] == value]
        return float(rows["median_us"].iloc[0]) if len(rows) else math.nan


def _rows(runs: Sequence[Run], steps: _Steps, prices: _Prices) -> list[dict[str, Any]]:
    ram_mib = float(runs[0].summary["ram_mib"])
    image_mib = median([one.summary["image_bytes"] for one in runs]) / 2**20
    target = "tmpfs" if runs[0].record.host.get("image_filesystem") == "tmpfs" else "image-dir"

    def release_us(pages: int, busy: int) -> float:
        keys = {"ram_kind": "anon-thp", "pages": pages, "busy_threads": busy}
        return prices.us("unprotect", "sweep", "call", **keys)

    calls = ram_mib * _PAGES_PER_MIB / steps.sweep_pages
    release = [calls * release_us(steps.sweep_pages, busy) / 1e3 for busy in (0, 1)]
    write_us = prices.us("write", "fresh", "write", target=target)
    write = image_mib / 2 * write_us / 1e3
    copying = steps.sweep_pages > 1
    copy_us = prices.us("copy", "bulk-2m", "call", ram_kind="anon-thp")
    copy = image_mib / 2 * copy_us / 1e3 if copying else 0.0
    rows = [
        _row("release all of RAM", release[0], release[1]),
        _row("write the image", write, write),
        *([_row("copy what is in it", copy, copy)] if copying else []),
        _row(
            "sweep: all of these",
            release[0] + write + copy,
            release[1] + write + copy,
            [_phase_ms(one, "sweep") for one in runs],
        ),
    ]
    gather_us = prices.us("copy", "gather-4k", "call", ram_kind="anon-thp")
    aside_us = gather_us * steps.fault_pages / 512 if copying else 0.0
    low, high = ((release_us(steps.fault_pages, busy) + aside_us) / 1e3 for busy in (0, 1))
    latencies = [one.summary.get("fault_p50_us") for one in runs]
    rows.append(
        _row(
            "one fault, handler's side", low, high, [us / 1e3 for us in latencies if us is not None]
        )
    )
    beyond_mib = (runs[0].summary.get("wss_mib") or 0) - _BUFFER_MIB
    if copying and beyond_mib > 0 and runs[0].summary.get("workload") == "random":
        # Until its last pages are released, nearly every operation of a guest that writes to all
        # of its working set at random meets one of them; and no more than the buffer holds is
        # released before it has been written.  Nothing is known of what the buffer holds whole.
        stand = beyond_mib / 2 * (write_us + copy_us) / 1e3
        lost = [one.summary.get("lost_work_ms") for one in runs]
        rows.append(
            _row(
                "the working set less the buffer is written: lost work",
                stand,
                stand,
                [ms for ms in lost if ms is not None],
            )
        )
    return rows


def _row(step: str, low: float, high: float, values: Sequence[float] = ()) -> dict[str, Any]:
    row: dict[str, Any] = {"step": step, "floor_low_ms": low, "floor_high_ms": high}
    if values:
        interval = quantile_interval(list(values))
        row |= {"measured_ms": median(values), "n": len(values)}
        row |= {"measured_low_ms": interval.low, "measured_high_ms": interval.high}
    return row


def _phase_ms(one: Run, phase: str) -> float:
    phases = one.df_phases()
    return float(phases.loc[phases["phase"] == phase, "duration_ns"].sum()) / 1e6


def df_against_floor_readable(table: pd.DataFrame) -> pd.DataFrame:
    """`df_against_floor` as text for display."""
    floor = [
        _range(low, high)
        for low, high in zip(table["floor_low_ms"], table["floor_high_ms"], strict=True)
    ]
    names = ("measured_ms", "measured_low_ms", "measured_high_ms")
    measured = [
        three_digits(middle) + ("" if math.isnan(middle) else f" [{_range(low, high)}]")
        for middle, low, high in zip(*(table[name] for name in names), strict=True)
    ]
    ratio = [
        three_digits(middle / high)
        for middle, high in zip(table["measured_ms"], table["floor_high_ms"], strict=True)
    ]
    return pd.DataFrame(
        {
            **{name: table[name].map(DIMENSIONS[name].shown) for name in case_columns(table)},
            "step": table["step"],
            "floor ms": floor,
            "measured ms": measured,
            "measured / upper floor": ratio,
        }
    )


def _range(low: float, high: float) -> str:
    return three_digits(low) if low == high else f"{three_digits(low)} - {three_digits(high)}"
