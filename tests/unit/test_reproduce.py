"""What is written beside a measured set, and what the command lines say without measuring."""

from collections.abc import Callable

import pytest

from lab import notebooks, run
from lab.__main__ import main
from lab.cli.reproduce import PROFILES, write_up
from lab.scenario import METHODS

MakeSet = Callable[..., run.RunSet]


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
    assert len(run.load_set(made.path)) == len(made)


def test_quick_is_small_and_full_can_be_published() -> None:
    assert PROFILES["quick"].repeats == 3
    assert PROFILES["full"].repeats >= 6
    for profile in PROFILES.values():
        assert (profile.machine.ram_mib, profile.workload.wss_mib) == (1024, 256)


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
