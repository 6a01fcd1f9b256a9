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

When the last run is in, the set is sealed: `lab.runs.sealed` packs its runs into one table of each
kind and one file of their records.

Rules:

* A run folder appears whole or not at all: it is written beside its place and renamed.
* Its files are read-only once it is there (folders stay writable, so that a checkout can be moved
  or deleted).
* Loading checks every checksum, refuses a newer schema and unknown keys, and upgrades older
  schemas step by step.
* Failure is never a number: a failed or undecided run has null where its figures would be, and a
  reason.

What each column means is in `lab.runs.columns.COLUMNS` and, for people, in data/README.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import pyarrow.parquet as pq

from lab.display import html_row
from lab.errors import HostError, RunError, UsageError
from lab.host.files import write_atomically
from lab.host.room import require_room
from lab.runs import sealed
from lab.runs.methods import df_methods, df_readable
from lab.runs.records import (
    SET,
    SET_SCHEMA,
    ColumnRecord,
    RunRecord,
    SetRecord,
    TableRecord,
    encode_record,
    jsonable,
    utc_now,
)
from lab.runs.run import Run, host_name, load_run, run_name, write_protect, write_table
from lab.scenario.applications import ApplicationsPlan
from lab.scenario.command import command
from lab.scenario.document import from_json
from lab.scenario.floor import FloorPlan
from lab.scenario.plan import Plan

log = logging.getLogger(__name__)


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
        """What its runs measured: `snapshot`, `floor` (`lab floor`) or `applications` (`lab
        applications`).
        """
        return str(self.record.plan.get("kind", "snapshot"))

    @property
    def host(self) -> str:
        """What tables call the host that it was begun on."""
        return host_name(self.record.host)

    @property
    def plan(self) -> Plan | FloorPlan | ApplicationsPlan:
        """The plan that it was recorded by, to measure the same again.

        Raises RunError when this version of the lab cannot read it.
        """
        document = dict(self.record.plan)
        document.pop("order", None)
        try:
            kind = document.pop("kind", "snapshot")
            if kind == "applications":
                return from_json(ApplicationsPlan, document)
            if kind == "floor":
                del document["methods"]
                return from_json(FloorPlan, document)
            return from_json(Plan, document)
        except UsageError as error:
            raise RunError(
                f"the plan of {self.path} is not one of this version: {error.cause}", error.remedy
            ) from error

    @property
    def command(self) -> str:
        """The command line that measures the same again.  Raises as `plan` does."""
        return command(self.plan)

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
        if self.kind != "snapshot":
            # What it measured is not in a summary line.
            facts = {"run set": self.name, "kind": self.kind, "status": self.record.status}
            return html_row(facts | {"runs": str(len(self.runs))})
        table: str = df_readable(df_methods(self)).to_html(index=False, border=0, na_rep="-")
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

    def of(self, runs: Iterable[Run]) -> RunSet:
        """This set with these of its runs alone."""
        return RunSet(self.path, self.record, list(runs))

    def only(self, **values: Any) -> RunSet:
        """This set with the runs alone that have these values: of `method`, or of a parameter,
        whether the set varied it or not.  Several values in a tuple: any of them.
        """
        chosen = {k: v if isinstance(v, tuple) else (v,) for k, v in values.items()}
        return self.of(
            run for run in self.runs if all(run.value(k) in some for k, some in chosen.items())
        )

    def typical(self, case: str | None = None) -> Run:
        """The run whose duration is the (lower) median, of a case or of all: the one to show when
        only one can be shown.

        Raises RunError when none counts.
        """
        runs = self.measured(case)
        if not runs:
            what = "run" if case is None else f"run of {case}"
            raise RunError(f"{self.name} has no {what} that counts", "choose another")
        ordered = sorted(runs, key=lambda run: float(run.summary.get("duration_ms") or 0))
        return ordered[(len(ordered) - 1) // 2]

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
        name = run_name(record)
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
                table: write_table(partial / f"{table}.parquet", table, df)
                for table, df in tables.items()
            }
            for file, text in logs.items():
                (partial / file).write_bytes(text)
            record = msgspec.structs.replace(record, tables=stored, files=sorted(logs))
            (partial / "run.json").write_bytes(encode_record(record))
            (partial / sealed.CHECKSUMS).write_text(sealed.sums_text(partial), encoding="utf-8")
            write_protect(partial)
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
        write_atomically(self.path / "set.json", encode_record(record))
        (self.path / "set.json").chmod(0o444)

    def seal(self) -> None:
        """Pack a complete set into a few files (`lab.runs.sealed`).  The caller holds `lock`.

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
        sealed.pack(self.path, encode_record(record), packed)
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
    write_atomically(path / "set.json", encode_record(record))
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
                f"{store.folder / sealed.RUNS_JSON} is damaged: {error}",
                "restore it from its source",
            ) from error
        folder = run_set.path / run_name(record)
        runs.append(Run(folder, record, run_set.varied, store))
    return runs


def load_set(path: Path | str, *, verify: bool = True) -> RunSet:
    """Load a run set: sealed, complete or still being recorded.

    Raises RunError: no such set, damaged, half sealed, a run changed since it was recorded, or a
    newer schema.
    """
    path = Path(path)
    record = SET.read(path / "set.json")
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
    record = SET.read(path / "set.json")
    if record.status == "sealed" and sealed.run_folders(path):
        with RunSet(path, record, []).lock():
            sealed.Sealed(path).verify()
            sealed.clear(path)
        return load_set(path)
    found = load_set(path)
    with found.lock():
        found.seal()
    return found
