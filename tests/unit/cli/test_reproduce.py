"""What is written beside a measured set, and what the command lines say without measuring."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.__main__ import main
from lab.cli.reproduce import MAIN_SET, PROFILES, _measured, _other_sets, write_up
from lab.errors import HostError, RunError
from lab.measure.campaign import plan_here, plan_of
from lab.report import notebooks
from lab.runs.sets import RunSet, load_set
from lab.scenario.applications import ApplicationsPlan, turns
from lab.scenario.campaigns import campaign
from lab.scenario.floor import FloorPlan
from lab.scenario.instruments import Instruments
from lab.scenario.machine import Machine
from lab.scenario.methods import METHODS
from lab.scenario.plan import Plan, slots

MakeSet = Callable[..., RunSet]


@pytest.mark.thorough
@pytest.mark.notebook
async def test_report_notebooks_and_figures_are_made_from_the_set(
    make_synthetic_set: MakeSet, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_synthetic_set(repeats=3)
    await write_up(made)
    written = {path.name for path in (made.path / "notebooks").iterdir()}
    assert written == {path.name for path in notebooks.notebook_paths()}
    assert len(list((made.path / "figures").glob("*.png"))) >= 6
    assert (made.path / "report.html").exists()
    assert str(made.path / "report.html") in capsys.readouterr().out
    # What is written beside the runs does not make it another set.
    assert len(load_set(made.path)) == len(made)


@pytest.mark.thorough
@pytest.mark.notebook
async def test_a_page_shows_every_figure_beside_the_recorded_one(
    make_synthetic_set: MakeSet,
) -> None:
    made = make_synthetic_set(repeats=3)
    await write_up(made, beside=True)
    page = (made.path / "beside.html").read_text()
    figures = list((made.path / "figures").glob("*.png"))
    assert all(f"<b>{figure.stem}</b>" in page for figure in figures)
    recorded = {path.name for path in (notebooks.NOTEBOOKS / "figures").glob("*.png")}
    both = sum(figure.name in recorded for figure in figures)
    assert page.count("<img") == len(figures) + both
    assert page.count("no such figure") == len(figures) - both


def test_every_set_a_notebook_shows_is_recorded_and_can_be_measured_again() -> None:
    named = {n for path in notebooks.notebook_paths() for n in notebooks.sets_named(path).values()}
    assert MAIN_SET in named
    for name in named:
        recorded = load_set(notebooks.NOTEBOOKS.parent / "data" / name)
        if isinstance(plan := campaign(name).plan, FloorPlan):
            assert plan.repeats == len(recorded.measured())
        elif isinstance(plan, ApplicationsPlan):
            assert len(turns(plan)) == len(recorded)
        else:
            assert len(slots(plan)) == len(recorded)


async def test_what_is_measured_is_not_measured_again(
    make_synthetic_set: MakeSet, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_synthetic_set()
    found = await _measured(plan_of(made), made.path, "note")
    assert [one.name for one in found] == [one.name for one in made]
    assert f"already measured: {made.path}" in capsys.readouterr().out
    other = dataclasses.replace(plan_of(made), repeats=7)
    with pytest.raises((RunError, HostError)):
        await _measured(other, made.path, "note")


def test_kinds_of_ram_that_this_host_has_not_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def require(machine: Machine) -> None:
        if machine.ram_kind == "hugetlb":
            raise HostError("no huge pages", "reserve some")

    monkeypatch.setattr("lab.measure.campaign.require_ram", require)
    plan = Plan(methods=("live",), vary={"ram_kind": ("anon", "hugetlb"), "vcpus": (1, 2)})
    assert plan_here(plan).vary == {"ram_kind": ("anon",), "vcpus": (1, 2)}


def test_huge_pages_are_not_rebuilt_by_who_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(methods=("live",), instruments=Instruments(rebuild_huge_pages=True))
    monkeypatch.setattr("lab.measure.campaign.require_rebuild", lambda: None)
    assert plan_here(plan).instruments.rebuild_huge_pages

    def require() -> None:
        raise HostError("not permitted", "run as root")

    monkeypatch.setattr("lab.measure.campaign.require_rebuild", require)
    assert not plan_here(plan).instruments.rebuild_huge_pages


async def test_a_set_whose_accelerator_is_not_here_is_shown_as_it_was_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    async def problem(guest: str) -> str:
        return "there is no KVM"

    async def measured(plan: Plan, out: Path, note: str) -> None:
        assert plan.machine.accel != "kvm"
        asked.append(out.name)

    async def floor(plan: FloorPlan, out: Path, *, note: str) -> None:
        asked.append(out.name)

    monkeypatch.setattr("lab.vm.accelerator.kvm_guest_problem", problem)
    monkeypatch.setattr("lab.cli.reproduce._measured", measured)
    monkeypatch.setattr("lab.cli.floor.run_floor", floor)

    async def applications(plan: ApplicationsPlan, out: Path, *, note: str) -> None:
        assert plan.rounds == 1
        asked.append(out.name)

    monkeypatch.setattr("lab.cli.applications.run_applications", applications)
    own = await _other_sets(tmp_path, "", 1)
    assert sorted(own) == sorted(asked)
    assert {"kvm-methods", "floor", "redis-set"} <= set(own)
    assert "kvm-large" not in own
    assert "kvm-large is shown as it was recorded: there is no KVM" in capsys.readouterr().err


def test_quick_is_small_and_full_can_be_published() -> None:
    assert PROFILES["quick"].repeats == 3
    assert PROFILES["full"].repeats >= 6
    assert PROFILES["full"].every_set
    assert not PROFILES["quick"].every_set


def test_a_dry_run_needs_no_build_and_measures_every_method_by_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_QEMU_PATCHED", "/nonexistent")
    assert main(["measure", "--dry-run", "--repeats", "2", "--warmups", "1"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith(f"{3 * len(METHODS)} runs: 2 x {len(METHODS)} methods after 1 warm-up")
    assert sum("(warm-up)" in line for line in lines) == len(METHODS)


def test_a_dry_run_names_every_case_of_what_is_varied(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--method", "live", "--vary", "fault-around-pages=0,64", "--vary", "net=yes,no"]
    assert main(["measure", "--dry-run", "--repeats", "1", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert {line.split("  ", 2)[2] for line in lines} == {
        f"live, fault_around_pages={pages}, net={net}" for pages in (0, 64) for net in ("yes", "no")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["measure", "--method", "teleport", "--dry-run"], "unknown method 'teleport'"),
        (["measure", "--repeats", "0", "--dry-run"], "fewer than one repeat"),
        (["measure", "--ram-mib", "256", "--dry-run"], "does not fit"),
        (["measure", "--vary", "chunk-kib", "--dry-run"], "give it as PARAMETER=VALUE"),
        (["measure", "--vary", "net=maybe", "--dry-run"], "choose from: yes, no"),
        (["measure", "--vary", "net=no", "--vary", "net=yes", "--dry-run"], "names net twice"),
        (["measure", "--method", "background", "--chunk-kib", "256", "--dry-run"], "unpatched"),
        (["reproduce", "--profile", "slow"], "invalid choice: 'slow'"),
    ],
)
def test_unusable_arguments_are_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
