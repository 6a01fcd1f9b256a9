"""The records of run.json, set.json and runs.json, their schemas and upgrades."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pandas as pd

from lab.marks import Marks
from lab.records import Schema, encode

Outcome = Literal["ok", "failed", "undecided"]


class ColumnRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One column of a stored table: enough to read the file without this package."""

    name: str
    dtype: str
    unit: str
    doc: str


class TableRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stored table."""

    file: str
    rows: int
    columns: list[ColumnRecord]


class RunRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Contents of run.json (schema "lab.run/1").

    `scenario` is the parameters as asked for, `summary` the summary line
    (`lab.runs.columns.SUMMARY_FIELDS`), `binaries` names versions, build ids and hashes, `clocks`
    says which clock every `*_ns` value is of.
    """

    schema: str
    id: str
    kind: str
    created_utc: str
    outcome: Outcome
    reason: str | None
    method: str
    order: int
    round: int
    warmup: bool
    scenario: dict[str, Any]
    host: dict[str, Any]
    binaries: dict[str, Any]
    clocks: dict[str, str]
    marks: Marks
    summary: dict[str, Any]
    tables: dict[str, TableRecord]
    files: list[str]
    note: str = ""
    warnings: list[str] = []


class SetRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Contents of set.json (schema "lab.set/2").

    `status`: "complete" has every run, each in its folder; "sealed" has them packed, and `columns`
    says what the columns of their tables are.
    """

    schema: str
    name: str
    created_utc: str
    status: Literal["recording", "complete", "sealed"]
    plan: dict[str, Any]
    host: dict[str, Any]
    binaries: dict[str, Any]
    lab: dict[str, Any]
    columns: dict[str, list[ColumnRecord]] = {}
    note: str = ""


class RunsRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Contents of runs.json (schema "lab.runs/1"): the records of a sealed set's runs.

    `common` has what `scenario`, `host`, `binaries` and `clocks` of all runs have in common; of
    `tables` each run has the numbers of rows.
    """

    schema: str
    common: dict[str, dict[str, Any]]
    runs: list[dict[str, Any]]


_REMEDY = "name a run set that `lab measure` wrote"
RUN = Schema(family="lab.run", version=1, kind=RunRecord, remedy=_REMEDY)
SET = Schema(
    family="lab.set",
    version=2,
    kind=SetRecord,
    remedy=_REMEDY,
    # Schema 2 can be sealed; one of schema 1 never is.
    upgrades={1: lambda document: document},
)
RUNS = Schema(family="lab.runs", version=1, kind=RunsRecord, remedy="restore it from its source")
RUN_SCHEMA, SET_SCHEMA, RUNS_SCHEMA = str(RUN), str(SET), str(RUNS)


def utc_now() -> str:
    """Wall time for people, whole seconds.  Never used to compute anything."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def jsonable(value: Any) -> Any:
    """`value` in plain JSON types: numpy scalars unpacked, NaN and NA as null, paths as text,
    dataclasses as objects.
    """
    if value is None or value is pd.NA or isinstance(value, str | bool):
        return value if value is not pd.NA else None
    if isinstance(value, np.generic):
        return jsonable(value.item())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, int):
        return value
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [
            jsonable(v) for v in (sorted(value) if isinstance(value, set | frozenset) else value)
        ]
    if isinstance(value, Path):
        return str(value)
    return msgspec.to_builtins(value)


def encode_record(record: RunRecord | SetRecord) -> bytes:
    return encode(jsonable(msgspec.to_builtins(record)))
