"""A sealed run set is a few files, and every value that was recorded is in them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lab.__main__ import main
from lab.errors import HostError, RunError
from lab.runs import sealed
from lab.runs.records import RunRecord
from lab.runs.sets import RunSet, create_set, load_set, seal_set
from tests.support.paths import TEST_DATA

GOLDEN_1 = TEST_DATA / "synthetic-run-set-schema-1"
GOLDEN_2 = TEST_DATA / "synthetic-run-set-schema-2"

MakeSet = Callable[..., RunSet]
MakeRecord = Callable[..., RunRecord]


def frames(found: RunSet) -> dict[tuple[str, str], pd.DataFrame]:
    """Every table of every run, without what is said of its run beside the values."""
    tables = {(one.name, name): one.df(name) for one in found for name in one.record.tables}
    for table in tables.values():
        table.attrs = {}
    return tables


def assert_same(left: RunSet, right: RunSet) -> None:
    assert [one.name for one in left] == [one.name for one in right]
    assert [one.record for one in left] == [one.record for one in right]
    assert [one.case_values for one in left] == [one.case_values for one in right]
    assert left.record.plan == right.record.plan
    for one, other in zip(left, right, strict=True):
        assert {f: one.log(f) for f in one.record.files} == {
            f: other.log(f) for f in other.record.files
        }
    before, after = frames(left), frames(right)
    assert list(before) == list(after)
    for key, table in before.items():
        pd.testing.assert_frame_equal(table, after[key])


def test_every_value_and_type_comes_back(make_synthetic_set: MakeSet) -> None:
    loose = make_synthetic_set("loose", finish=False)
    packed = make_synthetic_set("packed")
    assert packed.record.status == "sealed"
    assert_same(loose, packed)
    assert_same(loose, load_set(packed.path))


@pytest.mark.parametrize("repeats", [1, 7])
def test_it_is_a_few_files_however_many_runs_there_are(
    make_synthetic_set: MakeSet, repeats: int
) -> None:
    made = make_synthetic_set(repeats=repeats)
    assert sorted(path.name for path in made.path.iterdir()) == [
        "SHA256SUMS",
        "faults.parquet",
        "logs.parquet",
        "phases.parquet",
        "progress.parquet",
        "runs.json",
        "set.json",
    ]


def test_the_files_can_be_read_without_the_lab(make_synthetic_set: MakeSet) -> None:
    made = make_synthetic_set()
    faults = pd.read_parquet(made.path / "faults.parquet")
    live = made.runs[3]
    mine = faults[faults["run"] == live.record.order]
    assert mine["released_ns"].tolist() == live.df_faults()["released_ns"].tolist()
    # What follows from other columns is there as a difference, under that name.
    latency = mine["latency_ns - (released_ns - read_ns)"]
    assert (latency + mine["released_ns"] - mine["read_ns"]).tolist() == live.df_faults()[
        "latency_ns"
    ].tolist()
    assert (mine["gpa - offset"] == 0).all()


def test_a_set_of_schema_1_is_sealed_without_losing_a_value(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN_1, tmp_path / "old")
    assert main(["seal", str(tmp_path / "old")]) == 0
    upgraded = load_set(tmp_path / "old")
    assert upgraded.record.status == "sealed"
    assert_same(load_set(GOLDEN_1), upgraded)


def test_the_golden_set_of_schema_2_opens_and_is_that_of_schema_1() -> None:
    assert json.loads((GOLDEN_2 / "set.json").read_bytes())["schema"] == "lab.set/2"
    assert_same(load_set(GOLDEN_1), load_set(GOLDEN_2))


COLUMN = st.one_of(
    st.lists(st.integers(-(2**62), 2**62), min_size=4, max_size=4),
    st.lists(st.floats(allow_nan=True), min_size=4, max_size=4),
    st.lists(st.text(max_size=5), min_size=4, max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.lists(st.none() | st.integers(-5, 2**40), min_size=4, max_size=4).map(
        lambda values: pd.array(values, dtype="Int64")
    ),
    st.lists(st.sampled_from(["a", "b", "c"]), min_size=4, max_size=4).map(pd.Categorical),
)


@hypothesis_settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    columns=st.dictionaries(st.sampled_from(["x", "y", "phase", "start_ns"]), COLUMN, max_size=4),
    latency=st.lists(st.none() | st.integers(-(2**40), 2**40), min_size=4, max_size=4),
    released=st.lists(st.none() | st.integers(0, 2**40), min_size=4, max_size=4),
    cut=st.integers(0, 4),
)
def test_whatever_is_in_the_columns_comes_back(
    make_record: MakeRecord,
    tmp_path_factory: pytest.TempPathFactory,
    columns: dict[str, object],
    latency: list[int | None],
    released: list[int | None],
    cut: int,
) -> None:
    faults = pd.DataFrame(
        columns
        | {
            "gpa": np.array([0, 4096, 1 << 40, (1 << 63) - 4096], dtype=np.uint64),
            "offset": np.array([0, 8192, 0, (1 << 63) - 4096], dtype=np.uint64),
            "read_ns": np.arange(4, dtype=np.int64),
            "released_ns": pd.array(released, dtype="Int64"),
            "latency_ns": pd.array(latency, dtype="Int64"),
        }
    )
    path = tmp_path_factory.mktemp("any") / "set"
    made = create_set(path, plan={}, host={}, binaries={}, lab={})
    made.append(make_record("live", 0), {"faults": faults.iloc[:cut]})
    made.append(make_record("live", 1), {"faults": faults.iloc[cut:]})
    made.append(make_record("background", 2), {})
    before = {key: table.copy() for key, table in frames(made).items()}
    made.finish()
    assert made.record.status == "sealed"
    for key, table in frames(load_set(path)).items():
        pd.testing.assert_frame_equal(table, before[key], check_categorical=False)


FILES = 7


def interrupt_sealing(made: RunSet, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Seal a set, and be interrupted before this one of its files, or of its runs' folders."""
    steps = 0
    replace, remove = Path.replace, shutil.rmtree

    def count() -> None:
        nonlocal steps
        steps += 1
        if steps > step:
            raise KeyboardInterrupt

    def replace_or_stop(self: Path, target: Path) -> Path:
        if self.parent.name == sealed.PARTIAL:
            count()
        return replace(self, target)

    def remove_or_stop(path: Path, ignore_errors: bool = False) -> None:
        if path.name[0].isdigit():
            count()
        remove(path, ignore_errors=ignore_errors)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_or_stop)
        patch.setattr(shutil, "rmtree", remove_or_stop)
        with pytest.raises(KeyboardInterrupt):
            made.finish()


@pytest.mark.parametrize("step", range(FILES))
def test_interrupted_while_its_files_come_it_is_as_it_was(
    make_synthetic_set: MakeSet, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    expected = make_synthetic_set("expected", finish=False)
    made = make_synthetic_set(finish=False)
    interrupt_sealing(made, monkeypatch, step)
    left = load_set(made.path)
    assert left.record.status == "complete"
    assert_same(expected, left)
    assert_same(expected, seal_set(made.path))


@pytest.mark.parametrize("step", [FILES, FILES + 2])
def test_half_sealed_it_says_in_one_line_what_ends_it(
    make_synthetic_set: MakeSet, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    expected = make_synthetic_set("expected", finish=False)
    made = make_synthetic_set(finish=False)
    interrupt_sealing(made, monkeypatch, step)
    with pytest.raises(RunError) as caught:
        load_set(made.path)
    assert str(caught.value) == (
        f"{made.path} was interrupted while it was sealed; `lab seal {made.path}` ends it"
    )
    assert_same(expected, seal_set(made.path))
    assert_same(expected, load_set(made.path))
    assert not [path for path in made.path.iterdir() if path.is_dir()]


def rewrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "faults.parquet").unlink(), "faults.parquet is missing"),
        (lambda folder: (folder / "runs.json").unlink(), "runs.json is missing"),
        (lambda folder: rewrite(folder / "progress.parquet", b"else"), "parquet has changed"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), "no readable SHA256SUMS"),
    ],
)
def test_one_that_was_changed_is_refused_in_one_line(
    make_synthetic_set: MakeSet, damage: Callable[[Path], None], message: str
) -> None:
    folder = make_synthetic_set().path
    damage(folder)
    with pytest.raises(RunError, match=message) as caught:
        load_set(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("runs.json", b"{ not json", "damaged"),
        ("runs.json", b'{"schema": "lab.runs/2"}', "newer than lab.runs/1"),
        ("runs.json", b"[]", "does not say that it is a lab.runs file"),
        ("faults.parquet", b"not parquet", "cannot read"),
    ],
)
def test_one_that_is_damaged_is_refused_where_sums_are_not_looked_at(
    make_synthetic_set: MakeSet, file: str, content: bytes, message: str
) -> None:
    folder = make_synthetic_set().path
    rewrite(folder / file, content)
    with pytest.raises(RunError, match=message):
        load_set(folder, verify=False).runs[0].df_faults()


def test_what_else_lies_in_its_folder_is_the_users(make_synthetic_set: MakeSet) -> None:
    made = make_synthetic_set()
    (made.path / "figures").mkdir()
    (made.path / "notes.txt").write_text("mine")
    assert len(load_set(made.path)) == len(made)


def test_one_that_is_not_complete_or_is_sealed_is_not_sealed(make_synthetic_set: MakeSet) -> None:
    with pytest.raises(RunError, match="is recording, and cannot be sealed"):
        seal_set(make_synthetic_set("half", finish=False).path)
    with pytest.raises(RunError, match="is sealed, and cannot be sealed"):
        seal_set(make_synthetic_set().path)


def test_one_that_cannot_be_sealed_is_complete_all_the_same(
    make_synthetic_set: MakeSet,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = make_synthetic_set("expected", finish=False)
    made = make_synthetic_set(finish=False)
    with monkeypatch.context() as patch:
        patch.setattr("lab.host.room.room_bytes", lambda folder: 1000)
        made.finish()
        assert "is complete and not sealed" in caplog.text
        left = load_set(made.path)
        assert left.complete
        assert_same(made, left)
        with pytest.raises(HostError, match="a sealed run set needs"):
            seal_set(made.path)
    assert_same(expected, seal_set(made.path))


def test_one_without_runs_is_sealed_too(tmp_path: Path) -> None:
    made = create_set(tmp_path / "none", plan={}, host={}, binaries={}, lab={})
    made.finish()
    assert made.record.status == "sealed"
    assert len(load_set(made.path)) == 0


def test_tables_that_do_not_go_together_are_kept_run_by_run(
    make_record: MakeRecord, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = create_set(tmp_path / "set", plan={}, host={}, binaries={}, lab={})
    made.append(make_record("live", 0), {"faults": pd.DataFrame({"gpa": [1, 2]})})
    made.append(make_record("live", 1), {"faults": pd.DataFrame({"gpa": ["one"]})})
    made.finish()
    assert "cannot be packed" in caplog.text
    left = load_set(made.path)
    assert left.record.status == "complete"
    assert left.runs[1].df("faults")["gpa"].tolist() == ["one"]


def test_addresses_beyond_63_bits_come_back(make_record: MakeRecord, tmp_path: Path) -> None:
    made = create_set(tmp_path / "set", plan={}, host={}, binaries={}, lab={})
    high = pd.DataFrame({"gpa": np.array([1 << 63], "u8"), "offset": np.array([0], "u8")})
    made.append(make_record("live", 0), {"faults": high})
    made.finish()
    assert made.record.status == "sealed"
    assert load_set(made.path).runs[0].df("faults")["gpa"].tolist() == [1 << 63]


def test_runs_are_kept_when_what_was_written_does_not_read_back(
    make_synthetic_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_synthetic_set(finish=False)
    with monkeypatch.context() as patch:
        # A column that would be restored wrongly.
        patch.setattr("lab.runs.sealed._lengthen", lambda name, table: table.slice(0))
        made.finish()
    left = load_set(made.path)
    assert left.record.status == "complete"
    assert_same(made, left)
