"""A floor set condensed: one row a step that was timed, over rounds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from lab.column import three_digits
from lab.errors import RunError
from lab.runs.columns import COLUMNS
from lab.runs.run import Run
from lab.runs.sets import RunSet
from lab.scenario.floor import BENCHMARKS, RAM_KINDS, TARGETS, all_blocks
from lab.stats import median, quantile_interval

#: What makes a row of the table of medians.
KEYS = ("benchmark", "variant", "stage", "ram_kind", "target", "pages", "busy_threads")
STAGES = ("call", "fault", "deliver", "unprotect", "return", "write", "close", "sync")
_VARIANTS = list(dict.fromkeys(block.variant for block in all_blocks()))
_PAGES_PER_GIB = (1 << 30) // 4096
# Steps whose whole is a bandwidth: a long call in it counts for as much as it takes.
_TOTALS = ("write",)
# Steps that handle as many pages as they are given, in proportion or nearly so.
_PER_SIZE = ("arm", "unprotect", "copy", "scan", "write")
_FAULT_STAGES = {
    "deliver": "until the handler has it",
    "unprotect": "until it is released",
    "return": "until the writer goes on",
}
_HANDLERS = {
    "sleep-near": "handler sleeps on the same CPU",
    "sleep-far": "handler sleeps on another CPU",
    "spin": "handler spins on another CPU",
    "sigbus": "SIGBUS handler",
}


def require_floor(run_set: RunSet) -> None:
    """Raise RunError unless `run_set` was recorded by `lab floor`."""
    if run_set.kind != "floor":
        raise RunError(
            f"{run_set.name} holds snapshots, no floor", "name a set that `lab floor` wrote"
        )


def df_floor(run_set: RunSet) -> pd.DataFrame:
    """Every sample of a floor set.  Columns: run, then those of the table `floor`.

    :raise RunError: when the set is none of a floor.
    """
    require_floor(run_set)
    runs = [one for one in run_set.measured() if one.has("floor")]
    return _stacked(runs)


def _stacked(runs: Iterable[Run]) -> pd.DataFrame:
    parts = []
    for one in runs:
        table = one.df("floor")
        table.insert(0, "run", one.name)
        # Categories differ between runs where one of them could not measure everything.
        texts = table.select_dtypes("category").columns
        parts.append(table.astype(dict.fromkeys(texts, object)))
    columns = ["run", *COLUMNS["floor"]]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def df_floor_medians(run_set: RunSet) -> pd.DataFrame:
    """One row a step that was timed, over rounds.

    A round's figure is the median of its samples; of `write` it is the time of all writes divided
    by their number, because there the sum is what counts.  Columns: `KEYS`, then n (rounds),
    samples (in all of them), median_us, low_us, high_us (the order-statistic interval of the
    median over rounds, asked for at 95 %), coverage (what that is worth at this n), ms_per_gib
    (from the median; NA where a step has no size), label (all but the memory, for people).

    :raise RunError: when the set is none of a floor.
    """
    samples = df_floor(run_set)
    rows: list[dict[str, Any]] = []
    for key, part in samples.groupby(list(KEYS), dropna=False, sort=False):
        row: dict[str, Any] = dict(zip(KEYS, key, strict=True))
        row = {name: None if pd.isna(value) else value for name, value in row.items()}
        rounds = part.groupby("run")["value_ns"]
        figures = rounds.mean() if row["stage"] in _TOTALS else rounds.median()
        values = figures.to_numpy(dtype=float) / 1e3
        interval = quantile_interval(values)
        middle = median(values)
        sized = row["benchmark"] in _PER_SIZE
        rows.append(
            row
            | {
                "n": len(values),
                "samples": len(part),
                "median_us": middle,
                "low_us": interval.low,
                "high_us": interval.high,
                "coverage": interval.coverage,
                "ms_per_gib": middle / 1e3 / row["pages"] * _PAGES_PER_GIB if sized else None,
                "label": label(row),
            }
        )
    columns = [*KEYS, "n", "samples", "median_us", "low_us", "high_us", "coverage", "ms_per_gib"]
    rows.sort(key=_place)
    frame = pd.DataFrame(rows, columns=[*columns, "label"])
    texts = ["ram_kind", "target"]
    frame[texts] = frame[texts].astype(object).where(frame[texts].notna(), None)
    return frame.astype({"ms_per_gib": float})


def _place(row: dict[str, Any]) -> tuple[int, ...]:
    """Where a row is shown: as `all_blocks` has it, a block's stages in the order they happen."""
    order = (BENCHMARKS, RAM_KINDS, TARGETS, _VARIANTS, STAGES)
    names = ("benchmark", "ram_kind", "target", "variant", "stage")
    places = [
        known.index(row[name]) if row[name] in known else len(known)
        for known, name in zip(order, names, strict=True)
    ]
    return (*places[:3], int(row["busy_threads"]), *places[3:], int(row["pages"]))


def label(row: dict[str, Any]) -> str:
    """What a row of `df_floor_medians` is, in words; memory and target are columns beside it."""
    benchmark, variant, stage = row["benchmark"], row["variant"], row["stage"]
    busy = ", busy" if row["busy_threads"] else ""
    if benchmark == "arm":
        return f"protect {row['pages'] // 256} MiB, {variant}"
    if benchmark == "unprotect":
        return f"release {row['pages']} page{'s' if row['pages'] > 1 else ''}{busy}"
    if benchmark == "fault":
        handler = _HANDLERS.get(variant, variant)
        text = f"write fault, {handler}{busy}"
        return text if stage == "fault" else f"{text}: {_FAULT_STAGES.get(stage, stage)}"
    if benchmark == "copy":
        return f"copy 2 MiB, {'gathered from 4 KiB pages' if variant == 'gather-4k' else 'in one'}"
    if benchmark == "scan":
        return "find 2 MiB to be zero"
    if benchmark == "write" and stage == "write":
        return f"write 2 MiB, {variant}"
    return f"{stage} a file of {row['pages'] // 256} MiB, {variant}"


def df_floor_readable(run_set: RunSet) -> pd.DataFrame:
    """`df_floor_medians` as text for display: time of a step with its interval, ms a GiB, GiB/s."""
    medians = df_floor_medians(run_set)
    interval = [
        _with_range(*values)
        for values in zip(medians["median_us"], medians["low_us"], medians["high_us"], strict=True)
    ]
    per_gib = medians["ms_per_gib"]
    # What a bandwidth is the name for: not how long closing a file takes.
    moved = medians["benchmark"].where(medians["stage"].isin(["call", "write"]), "")
    return pd.DataFrame(
        {
            "step": medians["label"],
            "memory or file": [
                kind or target or "-"
                for kind, target in zip(medians["ram_kind"], medians["target"], strict=True)
            ],
            "n": medians["n"],
            "us": interval,
            "ms/GiB": [_number(value) for value in per_gib],
            "GiB/s": [
                _number(1e3 / value) if name in ("copy", "scan", "write") and value else "-"
                for name, value in zip(moved, per_gib, strict=True)
            ],
        }
    )


def _number(value: float) -> str:
    # Three significant digits, as in every table of the lab; a sign is possible here.
    return f"-{three_digits(-value)}" if value < 0 else three_digits(value)


def _with_range(middle: float, low: float, high: float) -> str:
    text = _number(middle)
    return text if low == high else f"{text} [{_number(low)} - {_number(high)}]"


def skipped(run_set: RunSet) -> list[str]:
    """What this host could not measure and why, one sentence each; rounds that failed."""
    reasons: dict[str, str] = {}
    found = []
    for one in run_set:
        reasons |= one.summary.get("skipped") or {}
        if not one.ok:
            found.append(f"{one.name} is {one.record.outcome}: {one.record.reason}")
    return found + [f"{name} was not measured: {reason}" for name, reason in reasons.items()]
