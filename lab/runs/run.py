"""One recorded run: its record, its tables, its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lab.display import html_row
from lab.errors import RunError
from lab.host.files import sha256_of
from lab.host.limits import Throttled
from lab.marks import with_marks
from lab.runs import sealed
from lab.runs.columns import COLUMNS, METRICS, SHORT
from lab.runs.records import RUN, ColumnRecord, RunRecord, TableRecord
from lab.scenario.dimensions import case_name, recorded_dimension


def run_name(record: RunRecord) -> str:
    return f"{record.order:03d}-{record.method}"


def host_name(recorded: Mapping[str, Any]) -> str:
    """What tables call a host: its CPUs and kernel, as recorded.  The name that its owner gave it
    is not recorded.
    """
    count, model = recorded.get("cpu_count"), recorded.get("cpu_model", "an unknown CPU")
    cpus = model if count is None else f"{count} x {model}"
    return f"{cpus}, Linux {recorded.get('kernel', 'unknown')}"


def write_table(path: Path, name: str, df: pd.DataFrame) -> TableRecord:
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


def write_protect(folder: Path) -> None:
    for path in folder.iterdir():
        path.chmod(path.stat().st_mode & ~0o222)


@dataclass(frozen=True)
class Run:
    """One loaded run."""

    path: Path
    """Its folder; in a sealed set, where that was."""
    record: RunRecord
    varied: tuple[str, ...] = ()
    """Dimensions besides the method of which it is one of several values: parameters that its run
    set varied, and the host beside runs of another (`lab.runs.cases.together`).
    """
    sealed_in: sealed.Sealed | None = None
    """The sealed set that it is packed in; None: it has its folder."""

    @property
    def dimensions(self) -> dict[str, Any]:
        """Its values of what was varied."""
        return {name: self.value(name) for name in self.varied}

    @property
    def host(self) -> str:
        """What tables call the host that it was measured on."""
        return host_name(self.record.host)

    def value(self, name: str) -> Any:
        """Its method, its host, or its value of a parameter.

        :raise UsageError: there is no such parameter.
        """
        of_run = {"method": self.record.method, "host": self.host}
        return of_run[name] if name in of_run else recorded_dimension(self.record.scenario, name)

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
        """The summary line: `lab.runs.columns.SUMMARY_FIELDS`, null where nothing applies."""
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
        """How a CPU quota held it back; None where there was none, or it was not looked for."""
        recorded = self.record.host.get("throttled")
        return None if recorded is None else msgspec.convert(recorded, Throttled)

    @property
    def beside(self) -> list[str]:
        """What was measured beside it, and which guests ran; empty where none, or unknown."""
        return list(self.record.host.get("beside", []))

    def has(self, table: str) -> bool:
        """Whether this run recorded `table`."""
        return table in self.record.tables

    def df(self, table: str) -> pd.DataFrame:
        """A stored table.

        Columns, units and clocks: `lab.runs.columns.COLUMNS[table]` and data/README.md.

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
        return with_marks(self.df(table), self.case_values, self.record.marks)

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
    run = Run(folder, RUN.read(folder / "run.json"))
    if verify:
        run.verify()
    return run
