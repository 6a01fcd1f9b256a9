"""Notebooks run from data alone, and what is committed of them can be read, diffed and trusted."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.errors import LabError, UsageError
from lab.measure.campaign import plan_of
from lab.report import notebooks
from lab.runs.sets import RunSet, load_set
from lab.scenario.plan import TYPICAL_RUN_S
from tests.support.paths import ROOT

FOLDER = ROOT / "notebooks"
PATHS = notebooks.notebook_paths(FOLDER)

MakeSet = Callable[..., RunSet]
Cell = dict[str, Any]

each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def cells(path: Path, kind: str | None = None) -> list[Cell]:
    document = json.loads(path.read_text(encoding="utf-8"))
    return [c for c in document["cells"] if kind in (None, c["cell_type"])]


def text_of(cell: Cell) -> str:
    return "".join(cell["source"])


def outputs_of(path: Path) -> list[Cell]:
    return [output for cell in cells(path, "code") for output in cell["outputs"]]


# --- They run ---------------------------------------------------------------------------------


@each
@pytest.mark.thorough
@pytest.mark.notebook
async def test_it_runs_from_any_run_set_without_qemu(
    path: Path, make_synthetic_set: MakeSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("LAB_QEMU_PATCHED", "LAB_QEMU_UNPATCHED"):
        monkeypatch.setenv(variable, "/nonexistent")
    made = make_synthetic_set(repeats=3)
    folder = tmp_path / "notebooks"
    folder.mkdir()
    source = Path(shutil.copy(path, folder))
    target = tmp_path / path.name
    # The copy has no data beside it: what it shows besides has to be named.
    sets = {name: str(ROOT / "data" / value) for name, value in notebooks.sets_named(path).items()}
    sets["DATA"] = str(made.path)
    await notebooks.execute(source, target, sets, timeout_s=60)
    # Neither a kernel's sockets nor anything else is left beside it.
    assert list(folder.iterdir()) == [source]
    assert len(notebooks.save_figures(target, tmp_path / "figures")) >= 3
    # Run again it is the same file: a change in a committed notebook is a change in its content.
    again = tmp_path / "again.ipynb"
    await notebooks.execute(path, again, sets, timeout_s=60)
    assert again.read_bytes() == target.read_bytes()


@each
@pytest.mark.thorough
@pytest.mark.notebook
async def test_it_runs_from_a_set_without_fault_logs(
    path: Path, make_synthetic_set: MakeSet, tmp_path: Path
) -> None:
    made = make_synthetic_set(methods=("background", "migrate-to-file"))
    await notebooks.execute(path, tmp_path / path.name, {"DATA": str(made.path)}, timeout_s=60)


@each
@pytest.mark.notebook
async def test_it_runs_from_the_recorded_data(path: Path, tmp_path: Path) -> None:
    await notebooks.execute(path, tmp_path / path.name, timeout_s=60)


def write_notebook(path: Path, code: str) -> Path:
    """A notebook of one cell that was not executed."""
    cell: Cell = {
        "cell_type": "code",
        "execution_count": None,
        "id": "a",
        "metadata": {},
        "outputs": [],
        "source": code,
    }
    document = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(document))
    return path


@pytest.mark.notebook
async def test_what_a_cell_prints_in_pieces_is_one_output(tmp_path: Path) -> None:
    code = "import time\nfor i in range(3):\n    print(i, flush=True)\n    time.sleep(0.5)"
    path = write_notebook(tmp_path / "00-pieces.ipynb", code)
    await notebooks.execute(path, path)
    assert ["".join(output["text"]) for output in outputs_of(path)] == ["0\n1\n2\n"]


@pytest.mark.notebook
async def test_a_cell_that_raises_fails_the_notebook_and_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "out.ipynb"
    target.write_text("old")
    source = write_notebook(tmp_path / "00-bad.ipynb", "1 / 0")
    with pytest.raises(LabError, match="ZeroDivisionError"):
        await notebooks.execute(source, target)
    assert target.read_text() == "old"
    with pytest.raises(UsageError, match="0 cells are tagged"):
        await notebooks.execute(source, target, {"DATA": "x"})


@each
def test_live_it_takes_less_than_ten_minutes_by_the_estimate(path: Path) -> None:
    sets = [load_set(ROOT / "data" / name) for name in notebooks.sets_named(path).values()]
    plans = [plan_of(one) for one in sets if one.kind == "snapshot"]
    boots = sum(len(plan.cases()) for plan in plans)
    source = "".join(text_of(cell) for cell in cells(path, "code"))
    found = re.search(r"lab\.recorded\(.*?repeats=(\d+)\)", source)
    boots *= int(found[1]) if found else 1
    assert boots * TYPICAL_RUN_S < 600


# --- What is in them --------------------------------------------------------------------------


def test_there_are_notebooks_and_each_is_in_the_index() -> None:
    assert PATHS
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    for path in PATHS:
        assert f"({path.name})" in index, path.name
    for name in re.findall(r"\(([0-9]{2}-[^)]*\.ipynb)\)", index):
        assert (FOLDER / name).exists(), name


@each
def test_exactly_one_cell_is_tagged_parameters(path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    cell = document["cells"][notebooks.parameters_cell(document)]
    assert "LIVE = False" in text_of(cell)
    assert 'DATA = "../data/' in text_of(cell)


@each
def test_it_is_short_and_begins_with_objectives_and_ends_with_limits(path: Path) -> None:
    found = cells(path)
    assert len(found) <= 25
    assert found[0]["cell_type"] == found[-1]["cell_type"] == "markdown"
    assert "**You will see**" in text_of(found[0])
    assert text_of(found[-1]).startswith("## Limits")


@each
def test_nothing_is_defined_installed_or_hidden_in_it(path: Path) -> None:
    for cell in cells(path, "code"):
        for line in text_of(cell).splitlines():
            assert not re.match(r"\s*(async\s+def|def|class)\b", line), line
            assert not re.match(r"\s*[!%]", line), line


@each
def test_no_measured_number_is_typed_into_its_prose(path: Path) -> None:
    unit = r"(?:ns|us|µs|ms|s|KiB|MiB|GiB|MB|GB|%|x|times|faults|pages)"
    for cell in cells(path, "markdown"):
        assert not re.search(rf"\b\d[\d.,]*\s?{unit}(?![\w-])", text_of(cell)), text_of(cell)


@each
def test_nothing_of_one_machine_is_in_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(?:root|home|tmp|work|mnt|Users)/", text)


@each
def test_its_metadata_does_not_change_with_every_run(path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["metadata"]["language_info"] == {"name": "python"}
    assert document["metadata"]["kernelspec"]["name"] == "python3"
    for cell in document["cells"]:
        assert set(cell["metadata"]) <= {"tags"}
        assert "id" in cell


@each
def test_committed_outputs_are_those_of_one_run_from_top_to_bottom(path: Path) -> None:
    counts = [cell["execution_count"] for cell in cells(path, "code")]
    assert counts == list(range(1, len(counts) + 1))
    figures = [o for o in outputs_of(path) if "image/png" in o.get("data", {})]
    assert figures
    assert path.stat().st_size < 1 << 20


@each
def test_committed_outputs_are_plain(path: Path) -> None:
    for output in outputs_of(path):
        assert output["output_type"] in ("display_data", "execute_result", "stream")
        assert output.get("name") != "stderr"
        kinds = set(output.get("data", {}))
        # Scripts do not run where people read notebooks, widgets do not survive being saved.
        assert kinds <= {"text/plain", "text/html", "image/png"}
        html = "".join(output.get("data", {}).get("text/html", ""))
        assert "<script" not in html
