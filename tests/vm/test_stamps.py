"""Memory and disks of a snapshot are of one instant, and it would be noticed if they were not."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import lab.__main__ as command_line
from lab.disks.store import Store
from lab.scenario.methods import METHODS
from lab.verify.stamps import pauses
from lab.verify.stamps.guest import Case
from lab.verify.stamps.record import SCHEMA
from lab.verify.stamps.stamps import Spoil, prove_case

pytestmark = [pytest.mark.vm, pytest.mark.platforms("tcg")]

INSTANTS = 3
#: Any would do; of a fixed one everybody waits the same times.
SEED = 21

QUICK = [
    Case(disks=3, iothread=True, image_format="qcow2"),
    Case(disk="ide", method="background"),
]
THOROUGH = [
    *(Case(method=method, disks=2) for method in METHODS),
    *(Case(disk="ide", cache=cache) for cache in ("writeback", "none")),
    Case(disk="ide", disks=4, image_format="qcow2"),
    Case(disk="scsi", disks=3, iothread=True, cache="none"),
    Case(disk="scsi", image_format="qcow2", method="stop-and-copy"),
    Case(disks=4, iothread=True, cache="none", method="migrate-to-file"),
    Case(disks=2, iothread=True, cache="none", image_format="qcow2", sync_every=1),
    Case(disks=3, cached=True, sync_every=8),
    Case(disk="ide", cached=True, sync_every=1, image_format="qcow2"),
]


@pytest.fixture(autouse=True)
def layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store of the test's own, in which nothing is left."""
    folder = tmp_path / "layers"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("LAB_LAYERS_DIR", str(folder))
    yield folder
    assert not [path for path in folder.iterdir() if path.suffix == ".qcow2"]
    assert Store.default().folder == folder


def _require_direct_io(folder: Path) -> None:
    probe = folder / "probe"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"this file system has no direct I/O: {error.strerror}")
    finally:
        probe.unlink(missing_ok=True)


def _name(case: Case) -> str:
    default = dataclasses.asdict(Case())
    changed = {k: v for k, v in dataclasses.asdict(case).items() if v != default[k]}
    return ",".join(f"{name}={value}" for name, value in changed.items()) or "default"


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=_name(case)) for case in QUICK),
        *(pytest.param(case, id=_name(case), marks=pytest.mark.thorough) for case in THOROUGH),
    ],
)
async def test_memory_and_disks_are_of_one_instant(case: Case, tmp_path: Path) -> None:
    if case.cache == "none" or METHODS[case.method].direct_io:
        _require_direct_io(tmp_path)
    folder = tmp_path / "work"
    folder.mkdir()
    report = await prove_case(case, instants=INSTANTS, seed=SEED, folder=folder)
    assert report.failures == ()
    assert (report.instants, report.one_instant) == (INSTANTS, INSTANTS)
    assert report.rounds > 0
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "case"),
    [
        ("later", Case()),
        pytest.param("earlier", Case(disks=2), marks=pytest.mark.thorough),
        pytest.param("later", Case(cached=True, sync_every=4), marks=pytest.mark.thorough),
    ],
)
async def test_it_is_found_when_they_are_not(spoil: Spoil, case: Case, tmp_path: Path) -> None:
    report = await prove_case(case, instants=2, seed=SEED, folder=tmp_path, spoil=spoil)
    assert report.one_instant == 0
    for failure in report.failures:
        assert any("disk 0 is at round" in problem for problem in failure.problems)
        is_later = failure.newest[0] > failure.begun[0]
        assert is_later == (spoil == "later")


def test_a_record_is_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layers: Path
) -> None:
    out = tmp_path / "record.json"
    arguments = ["stamps", "--seed", "1", "--method", "live", "--out", str(out), "--json"]
    assert command_line.main([*arguments, "--instants", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["one_instant"] == 1
    assert command_line.main([*arguments, "--instants", "2"]) == 0
    record = SCHEMA.read(out)
    assert (record.instants, record.one_instant) == (2, 2)
    assert [one.seed for one in record.cases] == [1, 2]
    assert command_line.main(["stamps", "--seed", "2", "--out", str(out)]) == 2
    assert "--seed 1" in capsys.readouterr().err
    # The command has layers of its own.
    assert list(layers.iterdir()) == []


def test_what_disks_add_to_the_pause_is_measured_in_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layers: Path
) -> None:
    out = tmp_path / "pauses.json"
    arguments = ["disk", "pause", "--disks", "2", "--pairs", "3", "--out", str(out)]
    assert command_line.main([*arguments, "--json"]) == 0
    record = pauses.SCHEMA.read(out)
    assert out.read_text(encoding="utf-8") == capsys.readouterr().out
    assert [(one.disks, one.number) for one in record.pairs] == [(2, 1), (2, 2), (2, 3)]
    for one in record.pairs:
        # The overlays are put on top in the pause, and take a part of it.
        assert 0 < one.switch_ms < one.with_ms
        assert one.without_ms > 0
    assert list(layers.iterdir()) == []

    assert command_line.main(["disk", "pause", "--disks", "5"]) == 2
    assert "choose 1 to 4" in capsys.readouterr().err
    assert command_line.main(["disk", "pause", "--pairs", "0"]) == 2
    assert "choose one at least" in capsys.readouterr().err
