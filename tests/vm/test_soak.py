"""Random snapshots of random guests are equal byte for byte, and it would be noticed if not."""

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import lab
import lab.__main__ as command_line
from lab.scenario.methods import METHODS
from lab.session import VM
from lab.verify.soak.draw import MAX_RAM_MIB, VERSION, Choice, Offer, Trial, draw
from lab.verify.soak.record import read_record
from lab.vm.vm import BOOT_TIMEOUT_S

pytestmark = [pytest.mark.vm, pytest.mark.platforms("tcg")]

ITERATIONS = 20
#: Any would do; of a fixed one everybody sees the same.
SEED = 20


@pytest.mark.thorough
def test_twenty_random_snapshots_are_equal(
    tmp_path: Path,
    reserve_huge_pages: Callable[[int], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Without huge pages the guests that would have them get a memfd.
    reserve_huge_pages(2 * MAX_RAM_MIB)
    out = tmp_path / "record.jsonl"
    status = command_line.main(
        ["soak", f"--seed={SEED}", f"--iterations={ITERATIONS}", f"--out={out}"]
    )
    said = capsys.readouterr()
    assert status == 0, said.err
    # A guest that hung while it booted, which happens rarely, was booted again.
    results = [result for result in read_record(out) if result.outcome != "no-guest"]
    assert [result.iteration for result in results] == list(range(1, ITERATIONS + 1))
    assert results[0].seed == SEED
    assert {result.outcome for result in results} == {"equal"}
    # Engines are mixed in one QEMU, guests are different.
    assert len({result.method for result in results}) > 4
    assert len({result.machine["ram_kind"] for result in results}) > 2
    assert len({result.machine["vcpus"] for result in results}) > 2
    assert any(result.shot > 2 for result in results)
    for result in results:
        assert result.pages_compared >= result.machine["ram_mib"] * 256
        if METHODS[result.method].engine is not None and result.state == "running":
            assert result.faults, result
    assert f"{ITERATIONS} snapshots" in said.out


def first_seed(is_wanted: Callable[[Trial], bool], choice: Choice) -> int:
    """The first seed that gives what is wanted, wherever the tests run."""
    offer = Offer(ram_kinds=frozenset({"anon", "memfd"}), ksm=False, pressure=False, flash=False)
    return next(seed for seed in itertools.count() if is_wanted(draw(seed, choice, offer)))


def test_generations_are_compared_one_after_the_other_while_images_are_kept(
    tmp_path: Path,
) -> None:
    def is_chain(trial: Trial) -> bool:
        shots = trial.shots
        return trial.keep and len(shots) == 3 and all(shot.restored for shot in shots[1:])

    choice = Choice(guest="micro", methods=("live",), ram_kinds=("anon",))
    seed = first_seed(is_chain, choice)
    out = tmp_path / "record.jsonl"
    arguments = [f"--seed={seed}", "--iterations=3", "--guest=micro", "--method=live"]
    assert command_line.main(["soak", *arguments, "--ram-kind=anon", f"--out={out}"]) == 0
    results = read_record(out)
    assert [result.outcome for result in results] == ["equal"] * 3
    assert [result.generation for result in results] == [0, 1, 2]
    assert [result.images_kept for result in results] == [0, 1, 2]


def test_a_guest_that_is_stopped_is_compared_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "record.jsonl"
    arguments = ["--seed=1", "--iterations=2", "--guest=micro", "--method=live", "--state=paused"]
    assert command_line.main(["soak", *arguments, f"--out={out}"]) == 0
    results = read_record(out)
    assert [(result.outcome, result.state) for result in results] == [("equal", "paused")] * 2


def test_a_thread_that_is_stuck_fails_its_iteration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lab.verify.stuck.Watch.finding", "waited over 1 s for one page: CPU 0/TCG")
    out = tmp_path / "record.jsonl"
    arguments = ["--seed=1", "--iterations=1", "--guest=micro", "--method=live"]
    assert command_line.main(["soak", *arguments, f"--out={out}"]) == 1
    (result,) = read_record(out)
    assert result.outcome == "failed"
    assert result.pages_compared
    assert "waited over 1 s for one page: CPU 0/TCG" in capsys.readouterr().err


def test_a_command_of_another_version_of_what_is_drawn_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command_line.main(["soak", "--seed=1", "--iterations=1", "--draw=1"]) == 1
    said = capsys.readouterr().err
    assert "version 1" in said
    assert said.count("\n") == 1


@pytest.mark.thorough
@pytest.mark.usefixtures("damage_images")
def test_one_wrong_byte_fails_the_soak_which_says_how_to_see_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "record.jsonl"
    arguments = ["--seed=2", "--iterations=2", "--method=live", "--ram-kind=anon"]
    assert command_line.main(["soak", *arguments, f"--out={out}"]) == 1
    results = read_record(out)
    assert [(result.outcome, result.pages_differing) for result in results] == [("differs", 1)] * 2
    # A guest of which an image was wrong is left, so the second is another.
    assert [(result.seed, result.shot) for result in results] == [(2, 1), (3, 1)]
    said = capsys.readouterr().err
    assert f"again: lab soak --seed 3 --iterations 1 --draw={VERSION} --method=live" in said


@pytest.mark.thorough
@pytest.mark.usefixtures("damage_images")
def test_what_fails_is_made_simpler_and_the_command_for_it_fails_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    choice = ["--method=live", "--guest=micro"]
    arguments = ["--shrink", "--attempts=1", f"--seed={SEED}", "--iterations=2", *choice]
    assert command_line.main(["soak", *arguments]) == 1
    said = capsys.readouterr().out
    assert said.startswith("differs: ")
    assert "ram_kind='anon'" in said
    assert "vcpus=1" in said
    again = shlex.split(said.split("again: lab ")[1])
    assert "--simplify=vcpus" in again
    assert command_line.main(again) == 1


def test_what_does_not_fail_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shrink", "--attempts=2", "--seed=3", "--iterations=1", "--guest=micro"]
    assert command_line.main(["soak", *arguments]) == 0
    assert "did not fail in 2 attempts" in capsys.readouterr().out


def test_a_soak_that_ended_goes_on_in_its_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "record.jsonl"
    arguments = ["--seed=5", "--iterations=3", "--method=live", "--guest=micro"]
    assert command_line.main(["soak", *arguments, f"--out={out}"]) == 0
    before = read_record(out)
    assert command_line.main(["soak", f"--resume={out}", "--iterations=3"]) == 2
    assert "has 3 iterations already" in capsys.readouterr().err
    assert command_line.main(["soak", f"--resume={out}", "--iterations=6"]) == 0
    results = read_record(out)
    assert results[:3] == before
    assert [result.iteration for result in results] == [1, 2, 3, 4, 5, 6]
    assert results[3].seed == before[-1].seed + 1
    assert {(result.method, result.machine["guest"]) for result in results} == {("live", "micro")}
    assert "6 snapshots" in capsys.readouterr().out


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("silent", "outcomes"), [(1, ["no-guest", "equal"]), (2, ["no-guest", "failed"])]
)
def test_a_guest_that_is_silent_at_boot_is_noted_and_booted_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: int, outcomes: list[str]
) -> None:
    # No guest says anything so soon.
    patience_s = iter([0.3] * silent + [BOOT_TIMEOUT_S] * 2)
    monkeypatch.setattr(
        "lab.verify.soak.soak.boot",
        lambda *args, **kw: lab.boot(*args, timeout_s=next(patience_s), **kw),
    )
    out = tmp_path / "record.jsonl"
    arguments = ["--seed=2", "--iterations=1", "--method=live", "--ram-kind=anon", f"--out={out}"]
    assert command_line.main(["soak", *arguments]) == silent - 1
    results = read_record(out)
    assert [(result.outcome, result.iteration) for result in results] == [
        (outcome, 1) for outcome in outcomes
    ]
    assert "silent for 0.3 s" in results[0].detail
    assert re.search(r"vCPU 0 (runs|halted) at [0-9a-f]+", results[0].detail)


@pytest.mark.thorough
def test_a_guest_that_is_silent_when_it_boots_after_its_snapshot_is_noted_and_booted_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_ready, calls = VM.wait_ready, 0

    async def impatient(vm: VM, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        nonlocal calls
        calls += vm._ready is None
        # The first is when the trial boots its guest.
        await wait_ready(vm, 0.3 if calls == 2 else timeout_s)

    monkeypatch.setattr(VM, "wait_ready", impatient)
    out = tmp_path / "record.jsonl"
    arguments = ["--seed=2", "--iterations=1", "--method=live", "--ram-kind=anon"]
    assert command_line.main(["soak", *arguments, "--state=prelaunch", f"--out={out}"]) == 0
    results = read_record(out)
    assert [result.outcome for result in results] == ["no-guest", "equal"]
    assert [result.state for result in results] == ["prelaunch", "prelaunch"]
    assert "silent for 0.3 s" in results[0].detail


def test_stop_ends_a_soak_and_leaves_its_record_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "record.jsonl"
    command = [sys.executable, "-m", "lab", "soak", "--minutes=60", "--method=live", "--json"]
    with subprocess.Popen(
        [*command, "--ram-kind=anon", f"--out={out}"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = (line for line in process.stdout)
        assert '"record":"soak"' in next(lines)
        # A guest that hung while it booted is noted, and booted once more.
        results = (line for line in lines if '"outcome":"no-guest"' not in line)
        assert '"outcome":"equal"' in next(results)
        guests = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGINT)
        rest = list(lines)
        assert process.wait(60) == 130
    assert '"record":"summary"' in rest[-1]
    assert not any(guest.is_running() for guest in guests)
    assert len(read_record(out)) >= 1
