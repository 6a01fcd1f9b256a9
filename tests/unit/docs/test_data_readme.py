"""data/README.md says what `lab.analysis.slowdown` says, and every recorded set opens.

Which sets are recorded is said in data/README.md. What else lies in data/ is the user's, who
measures there, and nothing of the tests' business.
"""

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import pytest

from lab.column import Column
from lab.qemu import qtest
from lab.runs.columns import APPLICATION_FIELDS, COLUMNS, SUMMARY_FIELDS
from lab.runs.records import RunRecord
from lab.runs.sets import load_set
from lab.scenario.dimensions import Dimension
from lab.scenario.machine import RamKind
from lab.scenario.methods import METHODS
from lab.verify.soak.record import read_record, summarise
from lab.verify.stamps import pauses
from lab.verify.stamps import record as stamps
from tests.support.paths import DATA

_TABLE = (DATA / "README.md").read_text(encoding="utf-8").split("\n## The sets\n")[1]
SETS = [DATA / name for name in re.findall(r"^\| `([\w-]+)` \|", _TABLE.split("\n## ")[0], re.M)]


def rows_under(heading: str) -> dict[str, tuple[str, str]]:
    text = (DATA / "README.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", section, re.MULTILINE)
    return {name: (unit, doc) for name, unit, doc in rows}


def documented(columns: Mapping[str, Column | Dimension]) -> dict[str, tuple[str, str]]:
    return {name: (column.unit or "-", column.doc) for name, column in columns.items()}


def test_the_summary_line_is_documented_field_by_field() -> None:
    assert rows_under("Summary line") == documented(SUMMARY_FIELDS)


def test_the_summary_line_of_an_application_is_documented_field_by_field() -> None:
    assert rows_under("Summary line of an application") == documented(APPLICATION_FIELDS)


@pytest.mark.parametrize("table", COLUMNS)
def test_tables_are_documented_column_by_column(table: str) -> None:
    assert rows_under(f"{table}.parquet") == documented(COLUMNS[table])


def kind_of(stored: str) -> str:
    """What a type of Arrow is called in a `Column`."""
    if stored.startswith("dictionary<"):
        return "category"
    return "text" if stored in ("string", "large_string") else stored


def test_every_key_of_a_run_is_documented() -> None:
    text = (DATA / "README.md").read_text(encoding="utf-8")
    obvious = {"schema", "id", "kind", "created_utc", "method", "note"}
    for key in set(RunRecord.__struct_fields__) - obvious:
        assert f"`{key}`" in text, key


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.name)
def test_a_recorded_set_is_whole_unchanged_and_documented(path: Path) -> None:
    recorded = load_set(path)
    assert (recorded.name, recorded.record.status) == (path.name, "sealed")
    assert len(recorded) > 0
    for one in recorded:
        for name, table in one.record.tables.items():
            found = {column.name: kind_of(column.dtype) for column in table.columns}
            said = {name: column.dtype for name, column in COLUMNS[name].items()}
            assert list(found.items()) == list(said.items()), (one.name, name)


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.name)
def test_a_recorded_set_is_small_and_names_no_place_on_a_machine(path: Path) -> None:
    files = [file for file in path.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 6 << 20
    for file in files:
        if file.suffix in (".json", ".log"):
            text = file.read_text(encoding="utf-8", errors="replace")
            assert not re.search(r"(?<![\w.])/(?:root|home|tmp|work|mnt)/", text), file


def git(*arguments: str) -> list[str]:
    """Ask git about data/; its answer, line by line."""
    if shutil.which("git") is None or not (DATA.parent / ".git").exists():
        pytest.skip("not a checkout of git's")
    command = ["git", "-c", "safe.directory=*", "-C", str(DATA), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.splitlines()


def test_every_recorded_set_is_in_the_list() -> None:
    recorded = {Path(path).parent.name for path in git("ls-files", "*/set.json")}
    assert sorted(path.name for path in SETS) == sorted(recorded)


def test_a_set_that_somebody_measures_here_is_not_recorded_by_accident() -> None:
    """Field report F12. `make reproduce` and `lab measure --out data/mine` leave one."""
    for name in ("quick-20260101T000000Z", "mine"):
        assert git("check-ignore", f"{name}/set.json") == [f"{name}/set.json"]


def test_of_the_recorded_soak_every_live_snapshot_is_equal_and_there_are_hundreds() -> None:
    results = read_record(DATA / "soak.jsonl")
    live = [result for result in results if METHODS[result.method].mechanism == "background"]
    total = summarise(live)
    assert total["equal"] == total["iterations"] >= 200
    assert total["pages_differing"] == 0
    # Of a guest that did not boot there is nothing to compare.
    assert all(result.pages_compared > 0 for result in live if result.outcome != "no-guest")
    assert set(total["by_ram_kind"]) == set(get_args(RamKind))
    assert set(total["by_vcpus"]) == {"1", "2", "3", "4"}
    # A method that came later was not drawn.
    header = (DATA / "soak.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert set(summarise(results)["by_method"]) == set(json.loads(header)["choice"]["methods"])


def test_what_was_not_equal_in_the_recorded_soak_is_named() -> None:
    text = (DATA / "README.md").read_text(encoding="utf-8")
    for result in read_record(DATA / "soak.jsonl"):
        if result.outcome != "equal":
            assert f"seed {result.seed}," in text


def test_the_patches_broke_none_of_qemus_own_tests() -> None:
    record = qtest.read_record(DATA / "qtest.json")
    assert record.regressions == []
    assert set(record.results) == set(record.tests)
    passed = [name for name, result in record.results.items() if result.patched == "passed"]
    assert len(passed) > len(record.tests) / 2


def test_of_the_recorded_proofs_every_snapshot_is_of_one_instant() -> None:
    record = stamps.SCHEMA.read(DATA / "stamps.json")
    assert record.one_instant == record.instants == sum(one.instants for one in record.cases)
    assert {one.case.disk for one in record.cases} == {"virtio", "ide", "scsi"}
    assert {one.case.disks for one in record.cases} == {1, 2, 3, 4}
    assert {one.case.cache for one in record.cases} == {"writeback", "none"}
    assert {one.case.image_format for one in record.cases} == {"raw", "qcow2"}
    assert len({one.seed for one in record.cases}) == len(record.cases)
    text = (DATA / "README.md").read_text(encoding="utf-8")
    guests = len(record.cases)
    assert f"are {record.instants} instants, all of one instant, of {guests} guests" in text
    assert f"at {record.in_flight} of them a write was on its way" in text
    of = Counter[str]()
    for one in record.cases:
        of[one.qemu] += one.instants
    assert all(f"{instants} " in text.split("stamps.json` are")[1] for instants in of.values())


def test_what_disks_add_to_the_pause_is_what_was_recorded() -> None:
    text = (DATA / "README.md").read_text(encoding="utf-8")
    found = pauses.added(pauses.SCHEMA.read(DATA / "disk-pauses.json").pairs)
    assert [one.disks for one in found] == [1, 2, 4]
    for one in found:
        row = (
            f"| {one.disks} | {one.n} | {one.without_ms:.2f} | {one.with_ms:.2f} "
            f"| {one.added_ms:+.2f} [{one.interval.low:+.2f} to {one.interval.high:+.2f}] "
            f"| {one.switch_ms:.2f} |"
        )
        assert row in text


def test_all_recorded_sets_together_are_small() -> None:
    files = [file for one in SETS for file in one.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 19_000_000
    assert len(files) < 200
    for one in SETS:
        assert len([file for file in files if file.parent == one]) <= 12
