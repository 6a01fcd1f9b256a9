"""Campaigns with real guests, small ones: what is recorded, and what an interruption leaves."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from lab.analysis.slowdown import BASELINE_NS
from lab.measure.campaign import measure
from lab.measure.ground import survey
from lab.report import notebooks
from lab.runs.columns import COLUMNS, METRICS, SUMMARY_FIELDS
from lab.runs.sets import load_set
from lab.scenario.machine import Machine
from lab.scenario.methods import METHODS
from lab.scenario.plan import Plan
from lab.scenario.workload import Workload
from tests.support.paths import ROOT

pytestmark = [pytest.mark.vm, pytest.mark.platforms("tcg")]

SMALL = ["--ram-mib", "256", "--wss-mib", "48"]


async def lab_command(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lab", *arguments),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ,
    )


def guests_of(pid: int) -> list[psutil.Process]:
    """QEMU processes that `pid` started; it is their parent."""
    return [p for p in psutil.Process(pid).children(recursive=True) if "qemu" in p.name()]


@pytest.mark.thorough
async def test_every_method_is_measured_verified_and_recorded(tmp_path: Path) -> None:
    plan = Plan(
        methods=tuple(METHODS),
        machine=Machine(ram_mib=256),
        workload=Workload("random", wss_mib=48),
        repeats=1,
        verify=True,
    )
    done = await measure(plan, tmp_path / "set", image_dir=tmp_path, ground=survey(plan))
    assert done.methods == list(METHODS)
    for one in done:
        line = one.summary
        assert (line["outcome"], line["verified"], line["reason"]) == ("ok", True, None), one.name
        not_always = {"faults", "pages_copied", "buffer_max_bytes", "buffer_waits"}
        # Of faults, if there are any, and of instruments that this plan does not ask for.
        of_some = ("fault_", "stall", "known_faults", "rebuild_", "rebuilt_", "rate_")
        never_null = {name for name in set(METRICS) - not_always if not name.startswith(of_some)}
        assert [name for name in never_null if line[name] is None] == []
        marks = one.record.marks
        assert marks.request_ns is not None
        assert marks.stop_ns is not None
        assert marks.resume_ns is not None
        assert marks.request_ns <= marks.stop_ns < marks.resume_ns
        logged = METHODS[one.record.method].binary == "patched"
        assert one.has("faults") == one.has("phases") == logged
        assert (line["faults"] is not None) == logged
        if logged:
            assert line["faults"] == len(one.df_faults()) > 0
        for name, table in one.record.tables.items():
            assert [c.name for c in table.columns] == list(COLUMNS[name])
        progress = one.df_progress()
        assert progress["t_ns"].iloc[0] <= marks.request_ns - BASELINE_NS
    # No image is left, and nothing else either.
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.thorough
async def test_json_is_one_line_a_run_with_every_field(tmp_path: Path) -> None:
    command = await lab_command(
        *("measure", "--method", "background", "--method", "stop-and-copy", "--repeats", "1"),
        *(*SMALL, "--json", "--out", str(tmp_path / "set")),
    )
    out, _ = await command.communicate()
    lines = [json.loads(line) for line in out.decode().splitlines()]
    assert command.returncode == 0
    assert {line["method"] for line in lines} == {"background", "stop-and-copy"}
    assert all(list(line) == list(SUMMARY_FIELDS) for line in lines)


async def test_an_interrupt_leaves_no_guest_and_a_set_that_can_be_continued(tmp_path: Path) -> None:
    out = tmp_path / "set"
    arguments = ["measure", "--method", "stop-and-copy", "--repeats", "2", *SMALL, "--json"]
    command = await lab_command(*arguments, "--out", str(out))
    assert command.stdout is not None
    # The first run is over; the second is about to boot or runs.
    first = json.loads(await command.stdout.readline())
    async with asyncio.timeout(60):
        while not (guests := guests_of(command.pid)):
            await asyncio.sleep(0.01)
    command.send_signal(signal.SIGINT)
    _, err = await command.communicate()
    assert command.returncode == 130
    assert f"--out {out} continue" in err.decode()
    assert not any(guest.is_running() for guest in guests)
    left = load_set(out)
    assert [r.summary for r in left] == [first]

    command = await lab_command(*arguments, "--out", str(out))
    text, _ = await command.communicate()
    assert command.returncode == 0
    assert len(text.splitlines()) == 1
    done = load_set(out)
    assert done.runs[0].summary == first
    assert done.complete


@pytest.mark.notebook
@pytest.mark.thorough
async def test_the_tour_runs_live(tmp_path: Path) -> None:
    source = ROOT / "notebooks" / "00-tour.ipynb"
    target = tmp_path / source.name
    await notebooks.execute(source, target, {"LIVE": True})
    assert "the same boot: True; torn pages: 0" in target.read_text(encoding="utf-8")
    assert len(notebooks.save_figures(target, tmp_path)) == 4
