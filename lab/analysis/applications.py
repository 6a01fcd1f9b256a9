"""What those who asked a server in the guest felt while its state was saved: recorded sets of
`lab applications`, condensed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa

from lab.analysis.requests import BIN_MS, RequestsMeta, unpack_requests
from lab.column import Metric, three_digits
from lab.runs.columns import APPLICATION_METRICS
from lab.runs.run import Run
from lab.runs.sets import RunSet
from lab.scenario.applications import SAME_AS, ApplicationsPlan
from lab.stats import compare, median, quantile_interval
from lab.units import NS_PER_MS, NS_PER_US

KIND = "applications"

SHOWN = (
    "request_p50_us",
    "request_p99_us",
    "request_p999_us",
    "request_worst_ms",
    "lost_requests",
    "pause_ms",
    "duration_ms",
    "vmm_cpu_s",
)
"""The metrics of the table for people."""

AGAINST = ("background", "migrate-to-file", "redis-bgsave")
"""What `live` is set against."""

COMPARED = ("request_worst_ms", "request_p999_us", "request_p99_us", "lost_requests")
"""By what."""


def _runs(run_set: RunSet, method: str | None = None) -> list[Run]:
    return [
        run
        for run in run_set.measured()
        if run.record.kind == KIND and method in (None, run.record.method)
    ]


def requests_of(run: Run) -> pd.DataFrame:
    """The requests of a run as `lab.loads.table` has them, those that were stored one by one: from
    a second before the snapshot's request until 0.5 s after its end.

    :raise RunError: the run has none.
    """
    stored = pa.Table.from_pandas(run.df("requests"), preserve_index=False)
    meta = msgspec.convert(run.summary["packed"], RequestsMeta)
    return unpack_requests(stored, meta)


def df_applications(run_set: RunSet) -> pd.DataFrame:
    """One row per method: medians over rounds, with intervals.

    Columns: method, n (rounds), and for each of `APPLICATION_METRICS` its median, and `_low` and
    `_high` of the order-statistic interval of that, asked for at 95 %.  Empty where the set has no
    requests.
    """
    rows: list[dict[str, Any]] = []
    names = [
        name
        for metric in APPLICATION_METRICS
        for name in (metric, f"{metric}_low", f"{metric}_high")
    ]
    for method in run_set.methods:
        runs = _runs(run_set, method)
        if not runs:
            continue
        row: dict[str, Any] = {"method": method, "n": len(runs)} | dict.fromkeys(names)
        for name in APPLICATION_METRICS:
            values = _values(runs, name)
            if values:
                interval = quantile_interval(values)
                row |= {
                    name: median(values),
                    f"{name}_low": interval.low,
                    f"{name}_high": interval.high,
                }
        rows.append(row)
    frame = pd.DataFrame(rows, columns=["method", "n", *names])
    return frame.astype(dict.fromkeys(names, float))


def _values(runs: Sequence[Run], name: str) -> list[float]:
    found = (run.summary.get(name) for run in runs)
    return [float(value) for value in found if value is not None]


def df_applications_readable(run_set: RunSet) -> pd.DataFrame:
    """`df_applications` as text for display."""
    medians = df_applications(run_set)
    columns = {"method": list(medians["method"]), "n": list(medians["n"])}
    for name in SHOWN:
        metric = APPLICATION_METRICS[name]
        columns[metric.title] = [
            _with_range(metric, *values)
            for values in zip(
                medians[name], medians[f"{name}_low"], medians[f"{name}_high"], strict=True
            )
        ]
    return pd.DataFrame(columns)


def _shown(value: float) -> str:
    # Three significant digits, as in every table of the lab; a sign is possible here.
    return f"-{three_digits(-value)}" if value < 0 else three_digits(value)


def _with_range(metric: Metric, middle: float, low: float, high: float) -> str:
    text = _shown(middle * metric.scale)
    if low == high or np.isnan(middle):
        return text
    return f"{text} [{_shown(low * metric.scale)} - {_shown(high * metric.scale)}]"


def df_application_ratios(
    run_set: RunSet, *, of: str = "live", against: Sequence[str] = AGAINST
) -> pd.DataFrame:
    """A method against others.

    One row per other method and metric of `COMPARED`.  Columns: against, metric, n (rounds of the
    smaller side), ratio (of medians; NaN where a value is not positive, as lost requests may be),
    low, high (the interval of the factor from all pairwise ratios of rounds, `lab.stats`), coverage
    (what that is worth at this n), p (of the permutation test).  Where the set lacks a method there
    is no row.
    """
    rows = []
    for other in against:
        for name in COMPARED:
            mine, theirs = (_values(_runs(run_set, m), name) for m in (of, other))
            if not mine or not theirs:
                continue
            found = compare(theirs, mine)
            interval = found.interval
            rows.append(
                {
                    "against": other,
                    "metric": name,
                    "n": min(len(mine), len(theirs)),
                    "ratio": found.ratio,
                    "low": None if interval is None else interval.low,
                    "high": None if interval is None else interval.high,
                    "coverage": None if interval is None else interval.coverage,
                    "p": found.p,
                }
            )
    columns = ["against", "metric", "n", "ratio", "low", "high", "coverage", "p"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.astype(dict.fromkeys(columns[3:], float))


def df_application_ratios_readable(run_set: RunSet, *, of: str = "live") -> pd.DataFrame:
    """`df_application_ratios` as text for display: a row per other method."""
    found = df_application_ratios(run_set, of=of)
    rows = []
    for other, part in found.groupby("against", sort=False):
        row = {f"{of} / ...": str(other), "n": str(part["n"].min())}
        for one in part.itertuples():
            title = APPLICATION_METRICS[str(one.metric)].title.rsplit(" ", 1)
            name = title[0] if title[-1] in ("us", "ms") else " ".join(title)
            row[name] = "-"
            if not np.isnan(float(str(one.ratio))):
                numbers = [three_digits(float(str(v))) for v in (one.ratio, one.low, one.high)]
                row[name] = f"{numbers[0]} [{numbers[1]} - {numbers[2]}]"
        rows.append(row)
    return pd.DataFrame(rows)


def df_several_applications(run_sets: Sequence[RunSet]) -> pd.DataFrame:
    """Several sets below each other, as text: a row per set and method, of medians over rounds.

    Columns: application (what asks for what, and the guest's RAM), method, n (rounds), before, 1/s
    (requests done a second before the snapshot), worst ms, p99.9 ms, lost, s of work (lost requests
    by the rate of before, which makes sets of different rates comparable), pause ms, duration ms.
    """
    rows = []
    for run_set in run_sets:
        title = _title(run_set)
        for method in run_set.methods:
            runs = _runs(run_set, method)
            if not runs:
                continue
            row = {"application": title, "method": method, "n": str(len(runs))}
            row |= {
                name: _of_median(_values(runs, metric), scale)
                for name, metric, scale in (
                    ("before, 1/s", "requests_per_s_before", 1.0),
                    ("worst ms", "request_worst_ms", 1.0),
                    ("p99.9 ms", "request_p999_us", NS_PER_US / NS_PER_MS),
                )
            }
            row["lost, s of work"] = _of_median(lost_s(runs))
            for name in ("pause_ms", "duration_ms"):
                row[APPLICATION_METRICS[name].title] = _of_median(_values(runs, name))
            rows.append(row)
    return pd.DataFrame(rows)


def df_several_application_ratios(run_sets: Sequence[RunSet], *, of: str = "live") -> pd.DataFrame:
    """`df_application_ratios_readable` of several sets, with the application before it."""
    parts = [
        df_application_ratios_readable(run_set, of=of).assign(application=_title(run_set))
        for run_set in run_sets
    ]
    table = pd.concat([pd.DataFrame(columns=["application"]), *parts], ignore_index=True)
    return table[["application", *(name for name in table if name != "application")]]


def lost_s(runs: Sequence[Run]) -> list[float]:
    """The work that each run lost, in seconds at its rate of before; negative when more was done.

    Runs with no rate, or whose requests do not reach to the window's end, are left out.
    """
    found = []
    for run in runs:
        lost = run.summary.get("lost_requests")
        rate = run.summary.get("requests_per_s_before")
        if lost is not None and rate:
            found.append(float(lost) / float(rate))
    return found


def _title(run_set: RunSet) -> str:
    plan = run_set.plan
    if not isinstance(plan, ApplicationsPlan):
        return run_set.name
    return f"{plan.served.title}; {plan.ram_mib} MiB"


def _of_median(values: Sequence[float], scale: float = 1.0) -> str:
    return _shown(median(values) * scale) if values else "-"


@dataclass(frozen=True, kw_only=True)
class Published:
    """Figures that somebody else published, as text: ranges and words are theirs."""

    source: str
    method: str
    setting: str
    worst: str
    p99: str
    degraded: str


_DRAFT = "bpf_fault (draft, doi.org/10.1145/3830418.3843896)"
_THEIRS = "Firecracker under KVM, 2 vCPUs, 8 GB, Redis SET, 50 clients, about 95,000 a second"
PUBLISHED = (
    Published(
        source=_DRAFT,
        method="live, userfaultfd",
        setting=_THEIRS,
        worst="900 - 1,100",
        p99="spikes near 500",
        degraded="about 2 s",
    ),
    Published(
        source=_DRAFT,
        method="live, bpf_fault",
        setting=_THEIRS,
        worst="160 - 270",
        p99="-",
        degraded="2 - 6 times the throughput of userfaultfd meanwhile",
    ),
)
"""What is known of a live snapshot of a loaded guest, from others."""


def df_beside_published(run_set: RunSet) -> pd.DataFrame:
    """The methods of a set, with what others published below them, as text.

    They cannot be divided by each other: accelerator, CPUs, size of RAM and the rate differ, which
    is what the column `setting` is for.
    """
    plan, medians = run_set.record.plan, df_applications(run_set)
    rows = []
    for row in medians.to_dict("records"):
        rate = three_digits(row["requests_per_s_before"])
        rows.append(
            {
                "source": "this lab",
                "method": row["method"],
                "setting": f"QEMU under TCG, {plan.get('vcpus')} vCPUs, {plan.get('ram_mib')} MiB, "
                f"{plan.get('application')}, {rate} a second",
                "worst request, ms": three_digits(row["request_worst_ms"]),
                "p99, ms": three_digits(row["request_p99_us"] / NS_PER_US),
                "slow for": f"{three_digits(row['duration_ms'] / 1e3)} s (duration)",
            }
        )
    for one in PUBLISHED:
        rows.append(
            {
                "source": one.source,
                "method": one.method,
                "setting": one.setting,
                "worst request, ms": one.worst,
                "p99, ms": one.p99,
                "slow for": one.degraded,
            }
        )
    return pd.DataFrame(rows)


def applications_notes(run_set: RunSet) -> list[str]:
    """What should be known of the numbers, one sentence each: samples that failed or were held
    back, requests that had no answer, methods that are steps of another.
    """
    found: list[str] = []
    for run in run_set:
        if not run.ok:
            found.append(f"{run.name} {run.record.outcome}: {run.record.reason}")
        if run.summary.get("censored_requests"):
            found.append(
                f"{run.name}: {run.summary['censored_requests']} requests had no answer when the "
                "load was ended, so its latencies are lower bounds"
            )
    warned: dict[str, int] = {}
    for run in _runs(run_set):
        for sentence in run.record.warnings:
            warned[sentence] = warned.get(sentence, 0) + 1
    found += [f"{count} samples: {sentence}" for sentence, count in warned.items()]
    found += [
        f"{name} is not measured by itself: it takes the steps of {same}"
        for name, same in SAME_AS.items()
        if same in run_set.methods and run_set.kind == KIND
    ]
    return found


def df_requests(run_set: RunSet) -> pd.DataFrame:
    """Every request that was stored of a set's runs, for figures.

    Columns: run, method, round, ms (when it was due, since the snapshot's request), latency_ms,
    ok, censored, during (whether it was outstanding at an instant of the window: from the request
    until 0.5 s after the end), and end_ms (when the method ended, since the request).
    """
    parts = []
    for run in _runs(run_set):
        table, marks = requests_of(run), run.record.marks
        if marks.request_ns is None or marks.end_ns is None:
            continue
        done = table["due_ns"] + table["latency_ns"]
        parts.append(
            pd.DataFrame(
                {
                    "run": run.name,
                    "method": run.record.method,
                    "round": run.record.round,
                    "ms": (table["due_ns"] - marks.request_ns) / NS_PER_MS,
                    "latency_ms": table["latency_ns"] / NS_PER_MS,
                    "ok": table["ok"],
                    "censored": table["censored"],
                    "during": done >= marks.request_ns,
                    "end_ms": _since(marks.request_ns, marks.end_ns),
                }
            )
        )
    columns = [
        *("run", "method", "round", "ms", "latency_ms", "ok", "censored", "during", "end_ms")
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def df_application_throughput(run_set: RunSet) -> pd.DataFrame:
    """Requests done in bins of 10 ms, for figures.

    Columns: run, method, round, ms (middle of the bin, since the snapshot's request),
    requests_per_s, share (of the rate of the second before), and the instants of the run since the
    request: stop_ms, resume_ms, end_ms (NaN where there was none).
    """
    parts = []
    for run in _runs(run_set):
        table, marks = run.df("throughput"), run.record.marks
        rate = run.summary.get("requests_per_s_before") or np.nan
        per_s = table["requests"] * (1e3 / BIN_MS)
        parts.append(
            pd.DataFrame(
                {
                    "run": run.name,
                    "method": run.record.method,
                    "round": run.record.round,
                    "ms": (table["bin"] + 0.5) * BIN_MS,
                    "requests_per_s": per_s,
                    "share": per_s / rate,
                    "stop_ms": _since(marks.request_ns, marks.stop_ns),
                    "resume_ms": _since(marks.request_ns, marks.resume_ns),
                    "end_ms": _since(marks.request_ns, marks.end_ns),
                }
            )
        )
    columns = [
        *("run", "method", "round", "ms", "requests_per_s", "share"),
        *("stop_ms", "resume_ms", "end_ms"),
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def _since(request_ns: int | None, t_ns: int | None) -> float:
    return np.nan if request_ns is None or t_ns is None else (t_ns - request_ns) / NS_PER_MS
