"""Run sets on disk: create, append, seal, load, upgrade.

A *run* is one boot of one guest with one snapshot taken by one method.  A *run set* is a folder
of runs that were measured by one plan.  While it is recorded::

    <set>/
      set.json              schema "lab.set/2": the plan, its seed, host, binaries, status
      000-live-rfc/
        run.json            schema "lab.run/1": what was asked, where, with what, what came of it
        faults.parquet      tidy tables, one row an event; ns are int64 of the host's
        progress.parquet      CLOCK_MONOTONIC
        phases.parquet
        qemu.log            what the processes said
        console.log
        SHA256SUMS          of every other file; `sha256sum -c SHA256SUMS` works by hand
      001-background/ ...

When the last run is in, the set is sealed: `lab.sealed` packs its runs into one table of each
kind and one file of their records.

Rules:

* A run folder appears whole or not at all: it is written beside its place and renamed.
* Its files are read-only once it is there (folders stay writable, so that a checkout can be moved
  or deleted).
* Loading checks every checksum, refuses a newer schema and unknown keys, and upgrades older
  schemas step by step.
* Failure is never a number: a failed or undecided run has null where its figures would be, and a
  reason.

What each column means is in `lab.columns.COLUMNS` and, for people, in data/README.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lab import sealed
from lab.columns import COLUMNS
from lab.display import html_row
from lab.errors import HostError, RunError
from lab.files import sha256_of, write_atomically
from lab.limits import Throttled
from lab.room import require_room
from lab.scenario import case_name, recorded_dimension
from lab.tables import with_marks

RUN_SCHEMA = "lab.run/1"
SET_SCHEMA = "lab.set/2"

log = logging.getLogger(__name__)

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


class Marks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Instants of the host's CLOCK_MONOTONIC, in ns; null when the run did not get there.

    request: just before the command that starts the snapshot was sent.
    stop, resume: when QEMU stamped its STOP and RESUME events.
    end: when QEMU reported the migration completed.
    back: from when the guest ran at its old rate again (`lab.tables.slowdown` defines it).
    """

    request_ns: int | None = None
    stop_ns: int | None = None
    resume_ns: int | None = None
    end_ns: int | None = None
    back_ns: int | None = None


class RunRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Contents of run.json (schema "lab.run/1").

    `scenario` is the parameters as asked for, `summary` the summary line
    (`lab.columns.SUMMARY_FIELDS`), `binaries` names versions, build ids and hashes, `clocks` says
    which clock every `*_ns` value is of.
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


Upgrade = Callable[[dict[str, Any]], dict[str, Any]]
# version n -> the function that turns a document of version n into one of version n + 1
RUN_UPGRADES: dict[int, Upgrade] = {}
SET_UPGRADES: dict[int, Upgrade] = {
    # Schema 2 can be sealed; one of schema 1 never is.
    1: lambda document: document | {"schema": "lab.set/2"},
}

_T = TypeVar("_T", RunRecord, SetRecord)


def _run_name(record: RunRecord) -> str:
    return f"{record.order:03d}-{record.method}"


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


def _encode(record: RunRecord | SetRecord) -> bytes:
    return (
        msgspec.json.format(msgspec.json.encode(jsonable(msgspec.to_builtins(record))), indent=1)
        + b"\n"
    )


def _decode(path: Path, schema: str, upgrades: Mapping[int, Upgrade], kind: type[_T]) -> _T:
    family, _, newest = schema.partition("/")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RunError(
            f"cannot read {path}: {error.strerror}", "name the folder of a run set"
        ) from error
    try:
        document = msgspec.json.decode(raw)
        stated = document.get("schema") if isinstance(document, dict) else None
        match = re.fullmatch(re.escape(family) + r"/([1-9][0-9]*)", stated or "")
        if match is None:
            raise RunError(
                f"{path} does not say that it is a {family} file",
                "name a run set that `lab measure` wrote",
            )
        version = int(match.group(1))
        if version > int(newest):
            raise RunError(
                f"{path} has schema {stated}, newer than {schema}, the newest this lab reads",
                "update the lab",
            )
        while version < int(newest):
            document = upgrades[version](document)
            version += 1
        return msgspec.convert(document, kind)
    except msgspec.DecodeError as error:
        # ValidationError is a DecodeError; its text names the key
        raise RunError(
            f"{path} is damaged or not a {schema} file: {error}", "restore it from its source"
        ) from error


def _write_table(path: Path, name: str, df: pd.DataFrame) -> TableRecord:
    table = pa.Table.from_pandas(df, preserve_index=False)
    sealed.write_parquet(path, table)
    documented = COLUMNS.get(name, {})
    columns = [
        ColumnRecord(
            name=field.name,
            dtype=str(field.type),
            unit=documented[field.name].unit if field.name in documented else "",
            doc=documented[field.name].doc if field.name in documented else "",
        )
        for field in table.schema
    ]
    return TableRecord(file=path.name, rows=table.num_rows, columns=columns)


def _seal(folder: Path) -> None:
    for path in folder.iterdir():
        path.chmod(path.stat().st_mode & ~0o222)


@dataclass(frozen=True)
class Run:
    """One loaded run."""

    path: Path
    """Its folder; in a sealed set, where that was."""
    record: RunRecord
    varied: tuple[str, ...] = ()
    """Parameters of which its run set measured several values."""
    sealed_in: sealed.Sealed | None = None
    """The sealed set that it is packed in; None: it has its folder."""

    @property
    def dimensions(self) -> dict[str, Any]:
        """Its values of the parameters that its run set varied."""
        return {name: recorded_dimension(self.record.scenario, name) for name in self.varied}

    @property
    def case_values(self) -> dict[str, Any]:
        """What it is a sample of, by column: its method, and its values of what was varied."""
        return {"method": self.record.method} | self.dimensions

    @property
    def case(self) -> str:
        """The name of what it is a sample of, as commands know it."""
        return case_name(self.record.method, self.dimensions)

    @property
    def summary(self) -> dict[str, Any]:
        """The summary line: `lab.columns.SUMMARY_FIELDS`, null where nothing applies."""
        return self.record.summary

    @property
    def ok(self) -> bool:
        return self.record.outcome == "ok"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def build(self) -> str:
        """Version and build id of the QEMU that was measured, for people."""
        qemu = self.record.binaries.get("qemu", {})
        return f"{qemu.get('version', 'unknown')} ({qemu.get('build_id', 'unknown')})"

    @property
    def throttled(self) -> Throttled | None:
        """How a CPU quota held it back; None where there was none, or nobody looked."""
        recorded = self.record.host.get("throttled")
        return None if recorded is None else msgspec.convert(recorded, Throttled)

    @property
    def beside(self) -> list[str]:
        """Who measured beside it, or ran a guest; empty where nobody did, or nobody looked."""
        return list(self.record.host.get("beside", []))

    def has(self, table: str) -> bool:
        """Whether this run recorded `table`."""
        return table in self.record.tables

    def df(self, table: str) -> pd.DataFrame:
        """A stored table.

        Columns, units and clocks: `lab.columns.COLUMNS[table]` and data/README.md.

        Raises RunError when this run did not record the table (a peer without a fault log, a
        failed run).
        """
        if table not in self.record.tables:
            have = ", ".join(sorted(self.record.tables)) or "none"
            raise RunError(
                f"run {self.name} has no table {table!r} (it has: {have})",
                "choose a run that recorded it",
            )
        if self.sealed_in is not None:
            return self.sealed_in.df(table, self.record.order)
        path = self.path / self.record.tables[table].file
        try:
            frame: pd.DataFrame = pq.read_table(path).to_pandas()
        except (OSError, pa.ArrowException) as error:
            raise RunError(f"cannot read {path}: {error}", "restore it from its source") from error
        return frame

    def df_faults(self) -> pd.DataFrame:
        """Write faults on protected pages, one row each, as the engine's handler logged them."""
        return self._marked("faults")

    def df_progress(self) -> pd.DataFrame:
        """Operations the guest had completed, sampled by the host."""
        return self._marked("progress")

    def _marked(self, table: str) -> pd.DataFrame:
        """A stored table that names the case and the instants in its `attrs`, so that
        `lab.plot_*` draw it as it is.
        """
        marks = self.record.marks
        return with_marks(
            self.df(table),
            case=self.case_values,
            request_ns=marks.request_ns,
            stop_ns=marks.stop_ns,
            resume_ns=marks.resume_ns,
            end_ns=marks.end_ns,
        )

    def df_phases(self) -> pd.DataFrame:
        """Phases of the snapshot, by the engine's own clock."""
        return self._marked("phases")

    def log(self, file: str) -> bytes:
        """What one of its processes said, of `record.files`: `qemu.log`, `console.log`.

        Raises RunError when this run recorded no such file.
        """
        if file not in self.record.files:
            have = ", ".join(self.record.files) or "none"
            raise RunError(f"run {self.name} has no {file} (it has: {have})", "name one of those")
        if self.sealed_in is not None:
            return self.sealed_in.logs(self.record.order)[file]
        path = self.path / file
        try:
            return path.read_bytes()
        except OSError as error:
            raise RunError(
                f"cannot read {path}: {error.strerror}", "load the set again, or restore the file"
            ) from error

    def verify(self) -> None:
        """Check its files, in a sealed set those of all runs, against their checksums.

        Raises RunError that names the first file that is missing, added or changed.
        """
        if self.sealed_in is not None:
            self.sealed_in.verify()
        else:
            verify_checksums(self.path)

    def __repr__(self) -> str:
        return f"<Run {self.name} {self.record.outcome}>"

    def _repr_html_(self) -> str:
        from lab.columns import METRICS, SHORT

        cells = {"run": self.name, "outcome": self.record.outcome}
        for metric in (METRICS[name] for name in SHORT):
            cells[metric.title] = metric.shown(self.summary.get(metric.name))
        return html_row(cells)


def held_back_text(runs: Sequence[Run], samples: str = "boots") -> list[str]:
    """What held back runs of a set, as parts of its stamp; empty when nothing is known to have."""
    throttled = sum(bool(run.throttled and run.throttled.throttled_periods) for run in runs)
    beside = sum(bool(run.beside) for run in runs)
    found = {"held back by a CPU quota": throttled, "beside other measurements or guests": beside}
    return [f"{what} in {n} of {len(runs)} {samples}" for what, n in found.items() if n]


def verify_checksums(folder: Path) -> None:
    """Raise RunError unless `folder` holds exactly the files its SHA256SUMS lists, unchanged."""
    listed = sealed.listed_sums(folder)
    present = {path.name for path in folder.iterdir()} - {sealed.CHECKSUMS}
    for name in sorted(present | set(listed)):
        if name not in present:
            raise RunError(f"{folder / name} is missing", "restore the run from its source")
        if name not in listed:
            raise RunError(
                f"{folder / name} does not belong to the run", "runs are immutable: remove it"
            )
        if sha256_of(folder / name) != listed[name]:
            raise RunError(
                f"{folder / name} has changed since it was recorded",
                "restore the run from its source",
            )


def load_run(folder: Path | str, *, verify: bool = True) -> Run:
    """Load one run folder.

    Raises RunError: no such run, damaged, changed since it was recorded, unknown keys, or a newer
    schema.
    """
    folder = Path(folder)
    run = Run(folder, _decode(folder / "run.json", RUN_SCHEMA, RUN_UPGRADES, RunRecord))
    if verify:
        run.verify()
    return run


class RunSet:
    """A folder of runs measured by one plan.  `load_set` opens one, `create_set` makes one."""

    def __init__(self, path: Path, record: SetRecord, runs: list[Run]) -> None:
        self.path = path
        self.record = record
        self.runs = runs

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def kind(self) -> str:
        """What its runs measured: `snapshot`, or `floor` (`lab floor`)."""
        return str(self.record.plan.get("kind", "snapshot"))

    @property
    def complete(self) -> bool:
        return self.record.status != "recording"

    def __iter__(self) -> Iterator[Run]:
        return iter(self.runs)

    def __len__(self) -> int:
        return len(self.runs)

    def __repr__(self) -> str:
        return f"<RunSet {self.name}: {len(self.runs)} runs, {self.record.status}>"

    def _repr_html_(self) -> str:
        from lab.summary import df_methods, df_readable

        if self.kind == "floor":
            from lab.floor.summary import df_floor_readable

            readable = df_floor_readable(self)
        else:
            readable = df_readable(df_methods(self))
        table: str = readable.to_html(index=False, border=0, na_rep="-")
        return table

    def measured(self, case: str | None = None) -> list[Run]:
        """Runs that count: outcome ok, not a warm-up, optionally of one case (`cases`)."""
        return [
            run
            for run in self.runs
            if run.ok and not run.record.warmup and (case is None or run.case == case)
        ]

    @property
    def methods(self) -> list[str]:
        """Methods with at least one run that counts, in the order of the plan."""
        found = {run.record.method for run in self.measured()}
        planned = [str(m) for m in self.record.plan.get("methods", [])]
        return [m for m in planned if m in found] + sorted(found - set(planned))

    @property
    def varied(self) -> tuple[str, ...]:
        """Parameters of which several values were measured, besides methods."""
        return tuple(sorted(self.record.plan.get("vary", {})))

    @property
    def case_columns(self) -> list[str]:
        """The columns that tell its cases apart in tables: the method, and what was varied."""
        return ["method", *self.varied]

    @property
    def cases(self) -> list[str]:
        """What samples were taken of, as far as there are runs that count, in the order of the
        plan: the methods, each with every combination of what was varied.
        """
        runs = self.measured()
        values = self.record.plan.get("vary", {})
        methods = self.methods

        def place(run: Run) -> tuple[int, ...]:
            of = run.dimensions
            return (
                methods.index(run.record.method),
                *(values[name].index(of[name]) for name in self.varied),
            )

        return list(dict.fromkeys(run.case for run in sorted(runs, key=place)))

    def cases_with(self, **values: Any) -> list[str]:
        """The cases that have these values of parameters that the set varied."""
        runs = self.measured()
        chosen = {r.case for r in runs if all(r.dimensions.get(k) == v for k, v in values.items())}
        return [case for case in self.cases if case in chosen]

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the set for writing.  Raises RunError when another process measures into it."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(
                    f"{self.path} is being recorded by another process",
                    "wait for it or name another --out",
                ) from error
            yield
        finally:
            os.close(descriptor)

    def append(
        self,
        record: RunRecord,
        tables: Mapping[str, pd.DataFrame],
        logs: Mapping[str, bytes] | None = None,
    ) -> Run:
        """Write one run, sealed, and add it to the set.

        `record.tables` and `record.files` are filled in here.  Raises RunError when the set is
        complete or the run is already there: recorded runs are never replaced.  Raises HostError
        when the disk has no room for it.
        """
        if self.complete:
            raise RunError(f"{self.path} is complete and sealed", "name another --out")
        logs = {file: text for file, text in (logs or {}).items() if text}
        size = sum(int(df.memory_usage().sum()) for df in tables.values())
        size += sum(map(len, logs.values()))
        remedy = "free some disk space; the same command then goes on with the set"
        require_room(self.path, size, "a recorded run", remedy)
        name = _run_name(record)
        final = self.path / name
        if final.exists():
            raise RunError(
                f"{final} is already recorded",
                "recorded runs are never replaced: name another --out",
            )
        partial = self.path / f".{name}.partial"
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        try:
            stored = {
                table: _write_table(partial / f"{table}.parquet", table, df)
                for table, df in tables.items()
            }
            for file, text in logs.items():
                (partial / file).write_bytes(text)
            record = msgspec.structs.replace(record, tables=stored, files=sorted(logs))
            (partial / "run.json").write_bytes(_encode(record))
            (partial / sealed.CHECKSUMS).write_text(sealed.sums_text(partial), encoding="utf-8")
            _seal(partial)
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        run = dataclasses.replace(load_run(final), varied=self.varied)
        self.runs.append(run)
        self.runs.sort(key=lambda r: r.record.order)
        return run

    def finish(self) -> None:
        """Mark the set complete, and seal it.  The caller holds `lock`.

        Where it cannot be sealed, it stays complete as it is, and a warning says why.
        """
        self._restate(msgspec.structs.replace(self.record, status="complete"))
        try:
            self.seal()
        except (RunError, HostError, OSError) as error:
            log.warning("%s is complete and not sealed: %s", self.path, error)

    def _restate(self, record: SetRecord) -> None:
        self.record = record
        write_atomically(self.path / "set.json", _encode(record))
        (self.path / "set.json").chmod(0o444)

    def seal(self) -> None:
        """Pack a complete set into a few files (`lab.sealed`).  The caller holds `lock`.

        Raises RunError when the set is not complete, is sealed already or was not read back as it
        was; HostError when the disk has no room for it.  The set then stays as it is.
        """
        if self.record.status != "complete":
            remedy = "the command that began it goes on with it"
            if self.complete:
                remedy = "there is nothing left to do"
            raise RunError(f"{self.path} is {self.record.status}, and cannot be sealed", remedy)
        size = sum(file.stat().st_size for run in self.runs for file in run.path.iterdir())
        require_room(self.path, size, "a sealed run set", "free some disk space; then `lab seal`")
        packed = [
            sealed.Packed(
                document=msgspec.json.decode(msgspec.json.encode(run.record)),
                tables={
                    name: pq.read_table(run.path / table.file)
                    for name, table in run.record.tables.items()
                },
                logs={file: run.log(file) for file in run.record.files},
            )
            for run in self.runs
        ]
        columns: dict[str, list[ColumnRecord]] = {}
        for run in self.runs:
            for name, table in run.record.tables.items():
                columns.setdefault(name, table.columns)
        record = msgspec.structs.replace(
            self.record, schema=SET_SCHEMA, status="sealed", columns=columns
        )
        sealed.pack(self.path, _encode(record), packed)
        self.record = record
        self.runs = _sealed_runs(self)


def create_set(
    path: Path | str,
    *,
    plan: Mapping[str, Any],
    host: Mapping[str, Any],
    binaries: Mapping[str, Any],
    lab: Mapping[str, Any],
    note: str = "",
) -> RunSet:
    """Make an empty run set.  Raises RunError when the folder exists and holds anything."""
    path = Path(path)
    if path.exists() and any(path.iterdir()):
        raise RunError(f"{path} exists and is not empty", "name another --out")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create {path}: {error.strerror}", "name another --out") from error
    record = SetRecord(
        schema=SET_SCHEMA,
        name=path.name,
        created_utc=utc_now(),
        status="recording",
        plan=jsonable(plan),
        host=jsonable(host),
        binaries=jsonable(binaries),
        lab=jsonable(lab),
        note=note,
    )
    write_atomically(path / "set.json", _encode(record))
    return RunSet(path, record, [])


def _sealed_runs(run_set: RunSet) -> list[Run]:
    store = sealed.Sealed(run_set.path)
    runs = []
    for document in store.documents():
        try:
            document["tables"] = {
                name: TableRecord(
                    file=f"{name}.parquet", rows=rows, columns=run_set.record.columns[name]
                )
                for name, rows in document["tables"].items()
            }
            record = msgspec.convert(document, RunRecord)
        except (msgspec.ValidationError, KeyError) as error:
            raise RunError(
                f"{store.folder / sealed.RUNS} is damaged: {error}", "restore it from its source"
            ) from error
        folder = run_set.path / _run_name(record)
        runs.append(Run(folder, record, run_set.varied, store))
    return runs


def load_set(path: Path | str, *, verify: bool = True) -> RunSet:
    """Load a run set: sealed, complete or still being recorded.

    Raises RunError: no such set, damaged, half sealed, a run changed since it was recorded, or a
    newer schema.
    """
    path = Path(path)
    record = _decode(path / "set.json", SET_SCHEMA, SET_UPGRADES, SetRecord)
    made = RunSet(path, record, [])
    if record.status == "sealed":
        if sealed.run_folders(path):
            raise RunError(
                f"{path} was interrupted while it was sealed", f"`lab seal {path}` ends it"
            )
        if verify:
            sealed.Sealed(path).verify()
        made.runs += _sealed_runs(made)
        return made
    runs = [load_run(folder, verify=verify) for folder in sealed.run_folders(path)]
    runs.sort(key=lambda run: run.record.order)
    made.runs += [dataclasses.replace(run, varied=made.varied) for run in runs]
    return made


def seal_set(path: Path | str) -> RunSet:
    """Seal a complete set, of any schema, or end what was interrupted; return the sealed set.

    Raises RunError: no such set, damaged, not complete, or in use by another process; HostError
    when the disk has no room for it.
    """
    path = Path(path)
    record = _decode(path / "set.json", SET_SCHEMA, SET_UPGRADES, SetRecord)
    if record.status == "sealed" and sealed.run_folders(path):
        with RunSet(path, record, []).lock():
            sealed.Sealed(path).verify()
            sealed.clear(path)
        return load_set(path)
    found = load_set(path)
    with found.lock():
        found.seal()
    return found
