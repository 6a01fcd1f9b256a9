import argparse
import asyncio
import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable

import pytest

import lab.__main__ as command_line
from lab import errors
from lab.scenario.plan import Plan

Handler = Callable[[argparse.Namespace], Awaitable[int] | int]


@pytest.fixture
def run_handler(monkeypatch: pytest.MonkeyPatch) -> Callable[[Handler], int]:
    """A function that runs a handler as if it were the only command, `probe`."""

    def run(handler: Handler) -> int:
        def parser() -> argparse.ArgumentParser:
            made = argparse.ArgumentParser()
            made.set_defaults(handler=handler, verbose=0)
            return made

        monkeypatch.setattr(command_line, "build_parser", parser)
        return command_line.main([])

    return run


def failing(error: BaseException) -> Handler:
    def handler(args: argparse.Namespace) -> int:
        raise error

    return handler


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["build", "--nonsense"], ["build", "x"]])
def test_unusable_arguments_are_one_line_and_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("lab: error: ")
    assert error.count("\n") == 1
    assert "--help" in error


def test_help_names_every_command_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in command_line.COMMANDS)


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main([command, "--help"]) == 0
    assert f"lab {command}" in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--samples", "3"], ["--dry-run"]])
def test_the_former_place_of_the_floor_names_its_command(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(["measure", "floor", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "use `lab floor`" in error


def test_the_floor_has_options_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["floor", "--benchmark", "write", "--dry-run"]) == 0
    assert "write fresh tmpfs" in capsys.readouterr().out


def test_measure_sets_the_order_of_runs_apart_from_the_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plans: list[Plan] = []

    def describe(plan: Plan) -> list[str]:
        plans.append(plan)
        return []

    monkeypatch.setattr("lab.scenario.plan.describe", describe)
    for given in (["--seed", "5"], ["--order-seed", "6"]):
        assert command_line.main(["measure", "--dry-run", *given]) == 0
    assert [(plan.workload.seed, plan.seed) for plan in plans] == [(5, 1), (1, 6)]


MEASURE_GROUPS = (
    *("campaign", "plan", "machine", "workload", "storage"),
    *("instruments", "output"),
)
SOAK_GROUPS = ("how much", "what is drawn", "what was found", "output")


@pytest.mark.parametrize(
    ("command", "groups"), [("measure", MEASURE_GROUPS), ("soak", SOAK_GROUPS)]
)
def test_long_help_has_groups_and_examples_that_parse(
    command: str, groups: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main([command, "--help"]) == 0
    text, _, examples = capsys.readouterr().out.partition("examples:\n")
    assert all(f"\n{group}:\n" in text for group in groups)
    commands = [line.strip().split("   ")[0].split() for line in examples.strip().splitlines()]
    assert len(commands) >= 3
    for _, *arguments in commands:
        command_line.build_parser().parse_args(arguments)
        if command == "measure":
            assert command_line.main([*arguments, "--dry-run"]) == 0


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, lab.__main__ as m; m.main(['--help']);"
        "sys.exit(not {'numpy', 'pandas', 'matplotlib', 'scipy'}.isdisjoint(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 0


def test_an_expected_failure_is_one_line_with_its_status(
    run_handler: Callable[[Handler], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_handler(failing(errors.HostError("no uffd", "be root"))) == 2
    assert capsys.readouterr().err == "lab: error: no uffd; be root\n"
    assert run_handler(failing(errors.SnapshotError("disk full"))) == 1


def test_a_failing_system_call_is_one_line(
    run_handler: Callable[[Handler], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_handler(failing(OSError(28, "No space left on device"))) == 1
    assert capsys.readouterr().err == "lab: error: [Errno 28] No space left on device\n"


def test_a_bug_is_not_hidden(run_handler: Callable[[Handler], int]) -> None:
    with pytest.raises(ZeroDivisionError):
        run_handler(failing(ZeroDivisionError()))


def test_the_status_of_a_coroutine_is_the_exit_status(
    run_handler: Callable[[Handler], int],
) -> None:
    async def handler(args: argparse.Namespace) -> int:
        await asyncio.sleep(0)
        return 7

    assert run_handler(handler) == 7


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_command_clean_up(
    run_handler: Callable[[Handler], int], number: signal.Signals, status: int
) -> None:
    cleaned = []

    async def handler(args: argparse.Namespace) -> int:
        try:
            asyncio.get_running_loop().call_soon(os.kill, os.getpid(), number)
            await asyncio.sleep(60)
        finally:
            cleaned.append(True)
        return 0

    assert run_handler(handler) == status
    assert cleaned == [True]


@pytest.mark.parametrize("arguments", [["--help"], ["doctor", "--json"]])
def test_a_reader_that_goes_away_is_not_reported(arguments: list[str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lab", *arguments], stdout=write_end, stderr=subprocess.PIPE
        )
    finally:
        os.close(write_end)
    assert done.stderr == b""
    # Only the argparse of older Pythons tells that its help was not read.
    printing = inspect.getsource(argparse.ArgumentParser._print_message)
    is_untold = arguments == ["--help"] and "OSError" in printing
    assert done.returncode == (0 if is_untold else 1)


def test_doctor_prints_json_that_parses(capsys: pytest.CaptureFixture[str]) -> None:
    status = command_line.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)

    assert set(report) == {"host", "checks"}
    assert all(set(check) == {"name", "status", "detail", "remedy"} for check in report["checks"])
    failed = any(check["status"] == "fail" for check in report["checks"])
    assert status == (2 if failed else 0)


def test_a_death_of_qemu_is_explained_at_length_only_when_asked(
    run_handler: Callable[[Handler], int],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    died = errors.LaunchError(
        "QEMU exited", "", command=["qemu", "-foo bar"], log_tail="first\nlast", exit_code=1
    )
    with caplog.at_level("INFO", logger="lab"):
        assert run_handler(failing(died)) == 1
    assert capsys.readouterr().err == "lab: error: QEMU exited\n"
    assert "qemu '-foo bar'" in caplog.text
    assert "first\nlast" in caplog.text
