"""Run folders: what is written comes back, what is wrong is refused, what is recorded stays."""

import dataclasses
import json
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest

from lab.analysis.slowdown import slowdown
from lab.errors import HostError, RunError
from lab.instruments.faultlog import fault_summary
from lab.runs import columns, sealed
from lab.runs.records import RUN, RunRecord, jsonable
from lab.runs.run import load_run
from lab.runs.sets import RunSet, create_set, load_set
from tests.support.paths import TEST_DATA

GOLDEN = TEST_DATA / "synthetic-run-set-schema-1"

MakeSet = Callable[..., RunSet]
MakeRecord = Callable[..., RunRecord]


def test_a_set_comes_back_as_it_was_written(make_synthetic_set: MakeSet) -> None:
    written = make_synthetic_set()
    loaded = load_set(written.path)
    assert [r.record for r in loaded] == [r.record for r in written]
    assert loaded.complete
    assert loaded.methods == ["live-rfc", "background", "migrate-to-file"]
    faults = loaded.measured("live-rfc")[0].df_faults()
    assert len(faults) == 307
    assert faults["vcpu"].dtype == "Int64"
    assert isinstance(faults["block"].dtype, pd.CategoricalDtype)
    assert faults["read_ns"].dtype == np.int64


def test_every_stored_column_is_documented(make_synthetic_set: MakeSet) -> None:
    for made in make_synthetic_set():
        for name, table in made.record.tables.items():
            assert [c.name for c in table.columns] == list(columns.COLUMNS[name])
            assert all(c.doc for c in table.columns)


def test_recorded_files_are_read_only_and_match_their_checksums(
    make_synthetic_set: MakeSet,
) -> None:
    unsealed = make_synthetic_set("unsealed", finish=False).runs[0].path
    for folder in (unsealed, make_synthetic_set().path):
        for path in folder.iterdir():
            assert not path.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH), path
        done = subprocess.run(
            ["sha256sum", "--check", "--quiet", sealed.CHECKSUMS], cwd=folder, check=False
        )
        assert done.returncode == 0


def test_writing_the_same_table_twice_gives_the_same_bytes(make_synthetic_set: MakeSet) -> None:
    for finish, folder in ((False, "000-live-rfc"), (True, ".")):
        a, b = (make_synthetic_set(f"{name}-{finish}", finish=finish).path for name in "ab")
        for name in ("faults.parquet", "progress.parquet", "phases.parquet"):
            assert (a / folder / name).read_bytes() == (b / folder / name).read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "faults.parquet").unlink(), "faults.parquet is missing"),
        (lambda folder: (folder / "extra").write_text("x"), "extra does not belong"),
        (lambda folder: _rewrite(folder / "qemu.log", b"else"), "qemu.log has changed"),
        (lambda folder: (folder / sealed.CHECKSUMS).unlink(), "no readable SHA256SUMS"),
    ],
)
def test_a_run_that_was_changed_is_refused(
    make_synthetic_set: MakeSet, damage: Callable[[Path], None], message: str
) -> None:
    folder = make_synthetic_set(finish=False).runs[0].path
    damage(folder)
    with pytest.raises(RunError, match=message):
        load_run(folder)


def _rewrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "run.json"
    document = json.loads(path.read_bytes()) | changes
    _rewrite(path, json.dumps(document).encode())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "lab.run/2"}, "newer than lab.run/1"),
        ({"schema": "flent/4"}, "does not say that it is a lab.run file"),
        ({"colour": "blue"}, "unknown field `colour`"),
        ({"round": "first"}, r"Expected `int`, got `str` - at `\$.round`"),
        ({"outcome": "fine"}, "Invalid enum value 'fine'"),
    ],
)
def test_a_record_that_does_not_fit_the_schema_is_refused_by_name(
    make_synthetic_set: MakeSet, changes: dict[str, Any], message: str
) -> None:
    folder = make_synthetic_set(finish=False).runs[0].path
    _edit(folder, **changes)
    with pytest.raises(RunError, match=message) as caught:
        load_run(folder, verify=False)
    assert "\n" not in str(caught.value)


def test_an_older_schema_is_upgraded_step_by_step(
    make_synthetic_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_synthetic_set(finish=False).runs[0].path
    upgrades = {
        1: lambda d: d | {"note": d["note"] + " one"},
        2: lambda d: d | {"note": d["note"] + " two"},
    }
    third = dataclasses.replace(RUN, version=3, upgrades=upgrades)
    monkeypatch.setattr("lab.runs.run.RUN", third)
    assert load_run(folder).record.note.endswith(" one two")


def test_what_is_not_a_run_set_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot read"):
        load_set(tmp_path)
    (tmp_path / "set.json").write_text("{ not json")
    with pytest.raises(RunError, match="damaged"):
        load_set(tmp_path)
    (tmp_path / "set.json").write_text("[]")
    with pytest.raises(RunError, match="does not say"):
        load_set(tmp_path)


def test_a_recorded_run_is_never_replaced(
    make_synthetic_set: MakeSet, make_record: MakeRecord
) -> None:
    made = make_synthetic_set(finish=False)
    with pytest.raises(RunError, match="already recorded"):
        made.append(make_record("live-rfc", 0), {})


def test_a_complete_set_takes_no_more_runs(
    make_synthetic_set: MakeSet, make_record: MakeRecord
) -> None:
    made = load_set(make_synthetic_set().path)
    with pytest.raises(RunError, match="complete"):
        made.append(make_record("live-rfc", 99), {})


def test_a_run_that_could_not_be_written_leaves_nothing(
    make_synthetic_set: MakeSet, make_record: MakeRecord
) -> None:
    made = make_synthetic_set(finish=False)
    before = sorted(p.name for p in made.path.iterdir())
    unwritable = pd.DataFrame({"mixed": [1, "two", object()]})
    with pytest.raises(Exception, match="mixed"):
        made.append(make_record("live-rfc", 50), {"faults": unwritable})
    assert sorted(p.name for p in made.path.iterdir()) == before


def test_a_folder_left_by_an_interrupted_write_is_no_run(make_synthetic_set: MakeSet) -> None:
    made = make_synthetic_set()
    (made.path / ".007-live-rfc.partial").mkdir()
    assert len(load_set(made.path)) == len(made)


def test_a_failed_run_has_no_figures_and_no_tables_but_a_reason(
    make_synthetic_set: MakeSet, make_record: MakeRecord
) -> None:
    made = make_synthetic_set(finish=False)
    failed = made.append(
        make_record("background", 40, outcome="failed", reason="disk full; free some"), {}
    )
    assert failed.record.reason == "disk full; free some"
    assert failed.summary["pause_ms"] is None
    assert failed not in made.measured("background")
    with pytest.raises(RunError, match="has no table 'faults'"):
        failed.df_faults()


def test_two_processes_cannot_record_into_one_set(make_synthetic_set: MakeSet) -> None:
    made = make_synthetic_set(finish=False)
    with made.lock(), pytest.raises(RunError, match="another process"), made.lock():
        pass


def test_an_existing_folder_with_something_in_it_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match="not empty"):
        create_set(tmp_path, plan={}, host={}, binaries={}, lab={})


def test_not_a_number_is_stored_as_null() -> None:
    given = {"a": float("nan"), "b": np.float64("inf"), "c": np.int64(3), "d": pd.NA, "e": (1, 2)}
    assert jsonable(given) == {"a": None, "b": None, "c": 3, "d": None, "e": [1, 2]}


def test_the_golden_set_of_schema_1_opens() -> None:
    golden = load_set(GOLDEN)
    assert json.loads((GOLDEN / "set.json").read_bytes())["schema"] == "lab.set/1"
    assert golden.record.schema == "lab.set/2"
    assert len(golden) == 3
    assert "SYNTHETIC" in golden.record.note
    live = golden.measured("live-rfc")[0]
    assert live.record.schema == "lab.run/1"
    # The figures that were stored are the figures that today's code computes.
    marks = live.record.marks
    assert marks.request_ns is not None
    assert marks.end_ns is not None
    cost = slowdown(live.df_progress(), request_ns=marks.request_ns, end_ns=marks.end_ns)
    assert cost.lost_work_ms == pytest.approx(live.summary["lost_work_ms"])
    assert cost.back_ns == marks.back_ns
    faults = fault_summary(live.df_faults())
    assert faults == {k: live.summary[k] for k in faults}
    assert live.summary["faults"] == 307


def test_the_record_says_what_the_columns_of_its_tables_are() -> None:
    document = json.loads((GOLDEN / "000-live-rfc" / "run.json").read_bytes())
    column = document["tables"]["faults"]["columns"][6]
    assert column == {
        "name": "read_ns",
        "dtype": "int64",
        "unit": "ns",
        "doc": columns.COLUMNS["faults"]["read_ns"].doc,
    }
    assert msgspec.convert(document, RunRecord).method == "live-rfc"


def test_a_run_for_which_the_disk_has_no_room_is_not_begun(
    make_synthetic_set: Callable[..., RunSet],
    make_record: Callable[..., RunRecord],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Field report F11."""
    made = make_synthetic_set(methods=("background",), repeats=1, finish=False)
    before = sorted(path.name for path in made.path.iterdir())
    monkeypatch.setattr("lab.host.room.room_bytes", lambda folder: 1000)
    table = pd.DataFrame({"t_ns": range(1000)})
    with pytest.raises(HostError, match=r"a recorded run needs .* the same command then goes on"):
        made.append(make_record("background", 1), {"progress": table})
    assert sorted(path.name for path in made.path.iterdir()) == before
