"""A set of requests that are made up, written by the real writer."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lab.loads.table import request_table
from lab.marks import Marks
from lab.measure.applications.sample import condensed
from lab.runs.columns import APPLICATION_FIELDS
from lab.runs.records import RUN_SCHEMA, RunRecord, jsonable
from lab.runs.sets import RunSet, create_set
from lab.scenario.applications import ApplicationsPlan, turns
from lab.scenario.document import to_json

MS = 1_000_000
REQUEST = 9_000_000_000_000
NOTE = "SYNTHETIC: made up by a test, measured nowhere"
# method -> pause in ms, duration in ms, speed meanwhile
SHAPES = {
    "live": (5, 200, 0.9),
    "background": (400, 600, 0.5),
    "none": (0, 1000, 1.0),
}


def made_up(rng: np.random.Generator, method: str) -> tuple[pd.DataFrame, Marks]:
    """Requests of 4 connections in a closed loop, 1 ms each, around a snapshot."""
    pause, duration, speed = SHAPES[method]
    end = REQUEST + duration * MS
    stop, resume = REQUEST + 10 * MS, REQUEST + (10 + pause) * MS
    rows = []
    until = end + 2200 * MS
    for client in range(4):
        due = REQUEST - 2300 * MS + client * 1000
        while due < until:
            slow = speed if REQUEST <= due < end else 1.0
            done = due + round(rng.uniform(0.8, 1.2) * MS / slow)
            if pause and due < resume and done > stop:
                done += resume - max(due, stop)
            rows.append((due, done if done < until else 0, client))
            due = done
    due_ns, done_ns, client_of = np.array(rows, dtype=np.int64).T.copy()
    table = request_table(
        due_ns=due_ns,
        sent_ns=due_ns,
        done_ns=done_ns,
        client=client_of,
        operation=pd.Categorical(["SET"] * len(rows), categories=["SET", "GET"]),
        number=np.zeros(len(rows), dtype=np.int64),
        ok=done_ns != 0,
        until_ns=until,
    )
    marks = Marks(
        request_ns=REQUEST,
        stop_ns=stop if pause else None,
        resume_ns=resume if pause else None,
        end_ns=end,
    )
    return table, marks


@pytest.fixture
def make_application_set(tmp_path: Path) -> Callable[..., RunSet]:
    def make(rounds: int = 5, *, fails: str = "") -> RunSet:
        plan = ApplicationsPlan(methods=tuple(SHAPES), rounds=rounds, clients=4)
        made = create_set(
            tmp_path / "made-up",
            plan=jsonable(to_json(plan)) | {"kind": "applications"},
            host={"cpu_count": 2, "cpu_model": "made up", "kernel": "6.1"},
            binaries={},
            lab={"version": "0"},
            note=NOTE,
        )
        for turn in turns(plan):
            table, marks = made_up(np.random.default_rng(turn.order), turn.method)
            figures, tables, logs = condensed(table, marks)
            pause, duration, _ = SHAPES[turn.method]
            failed = turn.method == fails and turn.round == 0
            summary = dict.fromkeys(APPLICATION_FIELDS) | {"method": turn.method}
            if not failed:
                summary |= figures | {"pause_ms": pause or None, "duration_ms": duration}
            record = RunRecord(
                schema=RUN_SCHEMA,
                id=f"{turn.order:032x}",
                kind="applications",
                created_utc="2026-01-01T00:00:00Z",
                outcome="failed" if failed else "ok",
                reason="it was to fail" if failed else None,
                method=turn.method,
                order=turn.order,
                round=turn.round,
                warmup=False,
                scenario=jsonable(to_json(plan)) | {"method": turn.method},
                host={},
                binaries={"qemu": {"version": "10", "build_id": "abc"}},
                clocks={},
                marks=marks,
                summary=jsonable(summary),
                tables={},
                files=[],
                note=NOTE,
            )
            made.append(record, {} if failed else tables, {} if failed else logs)
        made.finish()
        return made

    return make
