"""Shared fixtures: run sets that are made up, written by the real writer, and say that they
are made up.
"""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import settings

from lab.analysis.slowdown import slowdown
from lab.instruments.faultlog import fault_summary
from lab.marks import Marks
from lab.runs import columns
from lab.runs.records import RUN_SCHEMA, RunRecord
from lab.runs.run import Run
from lab.runs.sets import RunSet, create_set
from lab.scenario.document import to_json
from lab.scenario.machine import Machine
from lab.scenario.plan import Plan
from lab.scenario.workload import Workload

# How long an example takes says something about the machine, and nothing about the code.
settings.register_profile("lab", deadline=None)
settings.load_profile("lab")

# What a shell starts in the background ignores interrupts, and so does all that it starts itself.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

MS = 1_000_000
ORIGIN = 5_000_000_000_000
REQUEST = ORIGIN + 1200 * MS
NOTE = "SYNTHETIC: made up by tests/conftest.py, measured nowhere"

# method -> duration in ms, rate during it, pause in ms, engine
SHAPES: dict[str, tuple[float, float, float, str | None]] = {
    "live-rfc": (900, 0.3, 2, "rfc"),
    "background": (1700, 0.2, 2, "inline"),
    "migrate-to-file": (480, 0.9, 180, None),
}


def _progress(
    rng: np.random.Generator, duration_ms: float, share: float, pause_ms: float
) -> pd.DataFrame:
    t = np.arange(0, round(duration_ms) + 2700, dtype=np.int64) * MS + ORIGIN
    since = (t - REQUEST) / MS
    rate = np.ones(len(t))
    rate[(since >= 0) & (since < duration_ms)] = share
    rate[(since >= 1) & (since < 1 + pause_ms)] = 0
    steps = np.round(3000 * rate * rng.uniform(0.98, 1.02, len(t))).astype(np.int64)
    return pd.DataFrame({"t_ns": t, "ops": np.cumsum(steps), "read_ns": np.int64(7000)})


def _faults(rng: np.random.Generator, n: int, duration_ms: float) -> pd.DataFrame:
    read = REQUEST + 3 * MS + np.sort(rng.integers(0, round((duration_ms - 10) * MS), n))
    latency = rng.lognormal(10, 0.5, n).astype(np.int64)
    offset = rng.permutation(n).astype(np.uint64) * np.uint64(4096)
    seen = np.arange(n) % 11 != 0
    return pd.DataFrame(
        {
            "seq": np.arange(n, dtype=np.uint32),
            "gpa": offset,
            "offset": offset,
            "block": pd.Categorical(["pc.ram"] * n),
            "tid": np.full(n, 4711, dtype=np.int32),
            "vcpu": pd.array([0] * n, dtype="Int64"),
            "read_ns": read,
            "taken_ns": read + latency // 4,
            "saved_ns": np.where(seen, read + latency // 2, 0),
            "released_ns": np.where(seen, read + latency, 0),
            "latency_ns": pd.array(np.where(seen, latency, 0), dtype="Int64"),
            "pages": np.ones(n, dtype=np.uint16),
            "resolver": pd.Categorical(np.where(seen, "snapshot-thread", "sweep")),
            "queue_depth": np.zeros(n, dtype=np.uint32),
        }
    )


def _phases(duration_ms: float, pause_ms: float) -> pd.DataFrame:
    edges = {
        "setup": (0.0, 1.0),
        "stop": (1.0, 1.2),
        "device-state": (1.2, 0.8 + pause_ms),
        "arm": (0.8 + pause_ms, 0.9 + pause_ms),
        "resume": (0.9 + pause_ms, 1.0 + pause_ms),
        "sweep": (1.0 + pause_ms, duration_ms),
    }
    start = np.array([REQUEST + round(a * MS) for a, _ in edges.values()], dtype=np.int64)
    end = np.array([REQUEST + round(b * MS) for _, b in edges.values()], dtype=np.int64)
    return pd.DataFrame(
        {"phase": list(edges), "start_ns": start, "end_ns": end, "duration_ns": end - start}
    )


def plan_for(methods: tuple[str, ...], repeats: int) -> dict[str, Any]:
    """The plan as `lab measure` would have written it."""
    plan = Plan(
        methods=methods,
        repeats=repeats,
        machine=Machine(ram_mib=128),
        workload=Workload("random", wss_mib=16),
    )
    return to_json(plan)


def record_for(method: str, order: int, **changes: Any) -> RunRecord:
    """A run's record without figures."""
    values: dict[str, Any] = {
        "schema": RUN_SCHEMA,
        "id": f"{order:032x}",
        "kind": "snapshot",
        "created_utc": "2026-01-01T00:00:00Z",
        "outcome": "ok",
        "reason": None,
        "method": method,
        "round": 0,
        "order": order,
        "warmup": False,
        "scenario": {"machine": {"ram_mib": 128}, "workload": {"kind": "random", "wss_mib": 16}},
        "host": {"cpu_model": "made up", "kernel": "0"},
        "binaries": {"qemu": {"version": "0.0.0", "build_id": "synthetic"}},
        "clocks": {"host": "CLOCK_MONOTONIC"},
        "marks": Marks(),
        "summary": dict.fromkeys(columns.SUMMARY_FIELDS) | {"method": method, "outcome": "ok"},
        "tables": {},
        "files": [],
        "note": NOTE,
    }
    return RunRecord(**(values | changes))


def append_synthetic(run_set: RunSet, method: str, order: int, round_: int, seed: int) -> Run:
    """One made-up run with the tables of a real one."""
    rng = np.random.default_rng(seed)
    duration_ms, share, pause_ms, engine = SHAPES[method]
    duration_ms *= rng.uniform(0.95, 1.05)
    progress = _progress(rng, duration_ms, share, pause_ms)
    end = REQUEST + round(duration_ms * MS)
    cost = slowdown(progress, request_ns=REQUEST, end_ns=end)
    stored = {"progress": progress}
    if engine == "rfc":
        stored |= {
            "faults": _faults(rng, 307, duration_ms),
            "phases": _phases(duration_ms, pause_ms),
        }
    summary = (
        dict.fromkeys(columns.SUMMARY_FIELDS)
        | {
            "method": method,
            "engine": engine,
            "accel": "tcg",
            "outcome": "ok",
            "ram_mib": 128,
            "wss_mib": 16,
            "vcpus": 1,
            "workload": "random",
            "setup_ms": 1.0,
            "pause_ms": pause_ms,
            "duration_ms": duration_ms,
            "image_bytes": 20_000_000 + order,
            "baseline_ops_per_s": cost.baseline_ops_per_s,
            "lost_work_ms": cost.lost_work_ms,
            "min_rate_50ms": cost.min_rate_50ms,
            "max_gap_ms": cost.max_gap_ms,
            "recovery_ms": cost.recovery_ms,
            "back_capped": cost.back_capped,
        }
        | fault_summary(stored.get("faults"))
    )
    marks = Marks(
        request_ns=REQUEST,
        stop_ns=REQUEST + MS,
        resume_ns=REQUEST + round((1 + pause_ms) * MS),
        end_ns=end,
        back_ns=cost.back_ns,
    )
    record = record_for(method, order, round=round_, summary=summary, marks=marks)
    return run_set.append(record, stored, {"qemu.log": b"synthetic\n"})


@pytest.fixture
def make_synthetic_set(tmp_path: Path) -> Callable[..., RunSet]:
    """A function that makes up a run set: name, methods, repeats, seed."""

    def make(
        name: str = "synthetic",
        methods: tuple[str, ...] = tuple(SHAPES),
        repeats: int = 2,
        seed: int = 1,
        finish: bool = True,
    ) -> RunSet:
        made = create_set(
            tmp_path / name,
            plan=plan_for(methods, repeats),
            host={"cpu_model": "made up", "kernel": "0"},
            binaries={"patched": {"version": "0.0.0", "build_id": "synthetic"}},
            lab={"version": "0"},
            note=NOTE,
        )
        index = 0
        for round_ in range(repeats):
            for method in methods:
                append_synthetic(made, method, index, round_, seed * 1000 + index)
                index += 1
        if finish:
            made.finish()
        return made

    return make


@pytest.fixture
def make_record() -> Callable[..., RunRecord]:
    """`record_for`: a run's record without figures."""
    return record_for
