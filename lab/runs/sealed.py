"""A sealed run set on disk: a handful of files, whatever the number of its runs.

What was measured run by run is packed when the last run is in::

    data/<set>/
      set.json              schema "lab.set/2", status "sealed"
      runs.json             schema "lab.runs/1": what the runs' run.json said, a line per run
      progress.parquet      one table for all runs; `run` is the run's place in the campaign
      faults.parquet ...
      logs.parquet          what the processes said, where they said anything
      SHA256SUMS            of every other file; `sha256sum -c SHA256SUMS` works by hand

A column that follows from others is stored as its difference from what they say, which is zero
nearly everywhere and takes no room.  Its name is the difference: ``gpa - offset``.

Nothing is lost: `pack` reads everything back and compares before a single run is let go.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lab.errors import RunError
from lab.host.files import sha256_of
from lab.runs.records import RUNS, RUNS_SCHEMA, RunsRecord

CHECKSUMS = "SHA256SUMS"
RUNS_JSON = "runs.json"
LOGS = "logs"
PARTIAL = ".sealing"

# In a Parquet file: the type of a column that is stored as a difference, and what pandas has to
# know of all types, which tells Int64 with NA from float.
_TYPE = b"lab.type"
_PANDAS = b"lab.pandas"

# Of these parts of a run's record, what all runs have in common is written once.
_SHARED = ("scenario", "host", "binaries", "clocks")

# Tables whose numbers are differences already, without order: the bytes of each apart pack better.
_APART = ("requests",)

# Columns that follow from others of their row: the sum of some less others.
_EXPECTED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "faults": {"gpa": ("offset",), "latency_ns": ("released_ns", "read_ns")},
    "phases": {"duration_ns": ("end_ns", "start_ns")},
}


@dataclass(frozen=True)
class Packed:
    """One run as it goes into a sealed set: its record as plain JSON types, its tables, and what
    its processes said.
    """

    document: Mapping[str, Any]
    tables: Mapping[str, pa.Table]
    logs: Mapping[str, bytes]

    @property
    def order(self) -> int:
        return int(self.document["order"])


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table, under its name, so that it takes little room: timestamps and addresses come in
    order or nearly so, and differences pack several times better than values.
    """
    encoding = "BYTE_STREAM_SPLIT" if path.stem in _APART else "DELTA_BINARY_PACKED"
    encodings = {
        field.name: encoding
        for field in table.schema
        if pa.types.is_integer(field.type) and field.type.bit_width >= 32
    }
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=19,
        use_dictionary=[name for name in table.schema.names if name not in encodings],
        column_encoding=encodings,
    )


def _expected(table: pa.Table, terms: tuple[str, ...]) -> pa.ChunkedArray:
    first = table[terms[0]].cast(pa.int64())
    for name in terms[1:]:
        first = pc.subtract(first, table[name].cast(pa.int64()))
    return first


def _difference_name(column: str, terms: tuple[str, ...]) -> str:
    return f"{column} - {terms[0]}" if len(terms) == 1 else f"{column} - ({' - '.join(terms)})"


def _shorten(name: str, table: pa.Table) -> pa.Table:
    """Replace columns that follow from others by their differences, where that loses nothing."""
    for column, terms in _EXPECTED.get(name, {}).items():
        if not {column, *terms} <= set(table.column_names):
            continue
        values = table[column]
        if not pa.types.is_integer(values.type):
            continue
        try:
            difference = pc.subtract(values.cast(pa.int64()), _expected(table, terms))
        except pa.ArrowInvalid:
            # A value of which no int64 can be made.
            continue
        if difference.null_count == values.null_count:
            field = pa.field(
                _difference_name(column, terms), pa.int64(), metadata={_TYPE: str(values.type)}
            )
            table = table.set_column(table.column_names.index(column), field, difference)
    return table


def _lengthen(name: str, table: pa.Table) -> pa.Table:
    """Undo `_shorten`."""
    for column, terms in _EXPECTED.get(name, {}).items():
        stored = _difference_name(column, terms)
        if stored in table.column_names:
            recorded = pa.type_for_alias(table.schema.field(stored).metadata[_TYPE].decode())
            values = pc.add(table[stored], _expected(table, terms)).cast(recorded)
            table = table.set_column(table.column_names.index(stored), column, values)
    return table


def _joined(name: str, runs: Sequence[Packed]) -> pa.Table:
    """One table of all runs that have it."""
    parts = []
    for run in runs:
        if name in run.tables:
            table = run.tables[name].replace_schema_metadata(None)
            order = pa.array([run.order] * table.num_rows, type=pa.int32())
            parts.append(table.add_column(0, "run", order))
    joined = pa.concat_tables(parts, promote_options="permissive")
    return _shorten(name, joined.unify_dictionaries().combine_chunks())


def _pandas_of(table: pa.Table) -> bytes:
    """What pandas wrote about a table's types, without the attributes of one run."""
    about = msgspec.json.decode((table.schema.metadata or {}).get(b"pandas", b"{}"))
    return msgspec.json.encode(about | {"attributes": {}})


def _common(documents: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    common: dict[str, dict[str, Any]] = {}
    if not documents:
        return common
    for part in _SHARED:
        first = documents[0][part]
        common[part] = {
            key: value
            for key, value in first.items()
            if all(key in each[part] and each[part][key] == value for each in documents)
        }
    return common


def _runs_json(runs: Sequence[Packed]) -> bytes:
    documents = [run.document for run in runs]
    common = _common(documents)
    lines = []
    for document in documents:
        short = dict(document)
        for part, shared in common.items():
            short[part] = {k: v for k, v in document[part].items() if k not in shared}
        short["tables"] = {name: table["rows"] for name, table in document["tables"].items()}
        lines.append(msgspec.json.encode(short).decode())
    about = msgspec.json.encode({"schema": RUNS_SCHEMA, "common": common}).decode()
    return (about[:-1] + ',"runs":[\n' + ",\n".join(lines) + "\n]}\n").encode()


def sums_text(folder: Path) -> str:
    """The checksums of all files of a folder, as `sha256sum` writes them."""
    files = sorted(path for path in folder.iterdir() if path.name != CHECKSUMS)
    return "".join(f"{sha256_of(path)}  {path.name}\n" for path in files)


def listed_sums(folder: Path) -> dict[str, str]:
    """What a folder's SHA256SUMS says, by file.  Raises RunError when there is none."""
    try:
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RunError(
            f"{folder} has no readable {CHECKSUMS}", "restore it from its source"
        ) from error
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def run_folders(folder: Path) -> list[Path]:
    """The folders of single runs, in their order: of a set that is not sealed, or not quite."""
    return sorted(path.parent for path in folder.glob("[0-9]*-*/run.json"))


def pack(folder: Path, set_document: bytes, runs: Sequence[Packed]) -> None:
    """Write a sealed set in the place of its runs' folders, and remove these.

    Interrupted, it leaves either the set as it was or a whole sealed one beside folders that
    `clear` removes.  Raises RunError when what was written does not read back as it was.
    """
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        names = sorted({name for run in runs for name in run.tables})
        for name in names:
            first = next(run.tables[name] for run in runs if name in run.tables)
            joined = _joined(name, runs).replace_schema_metadata({_PANDAS: _pandas_of(first)})
            write_parquet(partial / f"{name}.parquet", joined)
        logs = [
            {"run": run.order, "file": file, "content": text}
            for run in runs
            for file, text in run.logs.items()
        ]
        if logs:
            write_parquet(partial / f"{LOGS}.parquet", pa.Table.from_pylist(logs))
        (partial / RUNS_JSON).write_bytes(_runs_json(runs))
        (partial / "set.json").write_bytes(set_document)
        _compare(Sealed(partial), runs)
        (partial / CHECKSUMS).write_text(sums_text(partial), encoding="utf-8")
        for path in partial.iterdir():
            path.chmod(0o444)
            _on_disk(path)
        # The set is a sealed one from when its set.json says so.
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "set.json"):
            path.replace(folder / path.name)
        _on_disk(folder)
    except pa.ArrowException as error:
        raise RunError(
            f"the tables of {folder} cannot be packed: {error}",
            "the set is left as it was, run by run; report this",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    clear(folder)


def _on_disk(path: Path) -> None:
    """Have a file, or what a folder lists, on the disk before the runs are removed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear(folder: Path) -> None:
    """Remove the folders of runs that a sealed set has packed."""
    for path in run_folders(folder):
        shutil.rmtree(path)


def _compare(sealed: Sealed, runs: Sequence[Packed]) -> None:
    read = {document["order"]: document for document in sealed.documents()}
    for run in runs:
        order = run.order
        same = {**read[order], "tables": None} == {**run.document, "tables": None}
        for name, table in run.tables.items():
            stored = sealed.arrow(name, order)
            plain = table.replace_schema_metadata(None)
            same = same and stored.column_names == plain.column_names
            same = same and all(
                _values(stored[column]).equals(_values(plain[column]))
                for column in plain.column_names
            )
        same = same and sealed.logs(order) == dict(run.logs)
        if not same:
            raise RunError(
                f"run {order} of {sealed.folder.parent} does not read back as it was when packed",
                "the set is left as it was, run by run; report this",
            )


def _values(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column without what is only about how it is stored."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_null(column.type):
        column = column.cast(pa.string())
    return pa.chunked_array([column.combine_chunks()])


@lru_cache(maxsize=16)
def _group(path: str, changed_ns: int, group: int) -> pa.Table:
    """A row group; kept, because a set's runs are asked for one after the other."""
    return pq.ParquetFile(path).read_row_group(group)


class Sealed:
    """Reads a sealed set."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: dict[str, dict[int, tuple[int, int]]] | None = None

    def verify(self) -> None:
        """Check the files against their checksums.  What else lies in the folder is not looked at.

        Raises RunError that names the first file that is missing or has changed.
        """
        listed = listed_sums(self.folder)
        for name in sorted({"set.json", *listed}):
            path = self.folder / name
            if not path.exists():
                raise RunError(f"{path} is missing", "restore the set from its source")
            if listed.get(name) != sha256_of(path):
                raise RunError(
                    f"{path} has changed since it was recorded", "restore the set from its source"
                )

    def _record(self) -> RunsRecord:
        return RUNS.read(self.folder / RUNS_JSON)

    def documents(self) -> Iterator[dict[str, Any]]:
        """The runs' records as they were, but for `tables`, which has the numbers of rows."""
        found = self._record()
        for short in found.runs:
            yield short | {part: shared | short[part] for part, shared in found.common.items()}

    def _places(self, name: str) -> dict[int, tuple[int, int]]:
        """Where each run's rows are in a table: the first, and how many."""
        if self._rows is None:
            self._rows = {}
            ends: dict[str, int] = {}
            for document in self._record().runs:
                for table, rows in document["tables"].items():
                    start = ends.get(table, 0)
                    self._rows.setdefault(table, {})[document["order"]] = (start, rows)
                    ends[table] = start + rows
        return self._rows[name]

    def arrow(self, name: str, order: int) -> pa.Table:
        """A run's table.  Raises RunError when the file cannot be read."""
        path = self.folder / f"{name}.parquet"
        start, rows = self._places(name)[order]
        try:
            about = pq.ParquetFile(path)
            pieces, at = [], 0
            for group in range(about.num_row_groups):
                size = about.metadata.row_group(group).num_rows
                if at < start + rows and start < at + size:
                    table = _group(str(path), path.stat().st_mtime_ns, group)
                    pieces.append(table.slice(max(start - at, 0), start + rows - max(start, at)))
                at += size
        except (OSError, pa.ArrowException) as error:
            raise RunError(f"cannot read {path}: {error}", "restore it from its source") from error
        table = pa.concat_tables(pieces) if pieces else about.schema_arrow.empty_table()
        if table.num_rows != rows or at < start + rows:
            raise RunError(f"{path} lacks rows of run {order}", "restore it from its source")
        return _lengthen(name, table.drop_columns("run"))

    def df(self, name: str, order: int) -> pd.DataFrame:
        """A run's table, with the types that it was recorded with.  The categories of a column are
        those of all runs.
        """
        table = self.arrow(name, order)
        about = pq.ParquetFile(self.folder / f"{name}.parquet").schema_arrow.metadata
        table = table.replace_schema_metadata({b"pandas": about[_PANDAS]})
        frame: pd.DataFrame = table.to_pandas()
        return frame

    def logs(self, order: int) -> dict[str, bytes]:
        """What a run's processes said, by file."""
        path = self.folder / f"{LOGS}.parquet"
        if not path.exists():
            return {}
        rows = pq.read_table(path).to_pylist()
        return {row["file"]: row["content"] for row in rows if row["run"] == order}
