"""KVM is asked by a program of its own, and one that does not run is no good news."""

import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lab.host import probe


@pytest.mark.parametrize(
    ("status", "stdout", "stderr", "said"),
    [
        (0, "", "", ""),
        (
            1,
            "KVM cannot create a VM: Permission denied\n",
            "",
            "KVM cannot create a VM: Permission",
        ),
        (1, "", "Traceback\nNo module named lab\n", "No module named lab"),
        (-11, "", "", "ended with status -11"),
    ],
)
def test_a_probe_that_fails_in_any_way_is_a_problem(
    status: int,
    stdout: str,
    stderr: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        asked.append(command)
        return subprocess.CompletedProcess(command, status, stdout, stderr)

    monkeypatch.setattr(probe, "KVM_DEVICE", tmp_path)
    monkeypatch.setattr("lab.host.probe.subprocess.run", run)
    problem = probe.probe_kvm()
    assert said in problem
    assert bool(problem) == bool(status)
    (command,) = asked
    assert importlib.util.find_spec(command[command.index("-m") + 1]) is not None


def test_where_there_is_no_device_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "KVM_DEVICE", tmp_path / "no-kvm")
    assert "there is no" in probe.probe_kvm()
