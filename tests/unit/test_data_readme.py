"""data/README.md says what `lab.tables` says, and every recorded set opens."""

import re
from pathlib import Path

import pytest

from lab import run
from lab.tables import COLUMNS, SUMMARY_FIELDS, Column

DATA = Path(__file__).resolve().parents[2] / "data"
SETS = sorted(path.parent for path in DATA.glob("*/set.json"))


def rows_under(heading: str) -> dict[str, tuple[str, str]]:
    text = (DATA / "README.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", section, re.MULTILINE)
    return {name: (unit, doc) for name, unit, doc in rows}


def documented(columns: dict[str, Column]) -> dict[str, tuple[str, str]]:
    return {name: (column.unit or "-", column.doc) for name, column in columns.items()}


def test_the_summary_line_is_documented_field_by_field() -> None:
    assert rows_under("Summary line") == documented(SUMMARY_FIELDS)


@pytest.mark.parametrize("table", COLUMNS)
def test_tables_are_documented_column_by_column(table: str) -> None:
    assert rows_under(f"{table}.parquet") == documented(COLUMNS[table])


def test_every_key_of_a_run_is_documented() -> None:
    text = (DATA / "README.md").read_text(encoding="utf-8")
    obvious = {"schema", "id", "kind", "created_utc", "method", "note"}
    for key in set(run.RunRecord.__struct_fields__) - obvious:
        assert f"`{key}`" in text, key


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.name)
def test_a_recorded_set_is_whole_unchanged_and_documented(path: Path) -> None:
    recorded = run.load_set(path)
    assert recorded.complete
    assert len(recorded) > 0
    for one in recorded:
        for name, table in one.record.tables.items():
            assert [c.name for c in table.columns] == list(COLUMNS[name]), (one.name, name)


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.name)
def test_a_recorded_set_is_small_and_names_no_place_on_a_machine(path: Path) -> None:
    files = [file for file in path.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 6 << 20
    for file in files:
        if file.suffix in (".json", ".log"):
            text = file.read_text(encoding="utf-8", errors="replace")
            assert not re.search(r"(?<![\w.])/(?:root|home|tmp|work|mnt)/", text), file


def test_all_recorded_sets_together_are_small() -> None:
    assert sum(file.stat().st_size for one in SETS for file in one.rglob("*")) < 20_000_000
