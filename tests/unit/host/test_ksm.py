"""KSM is switched on only as long as somebody holds it on, and the host's settings come back
whatever becomes of him.  On a folder that looks like the kernel's.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab.errors import HostError, TransientError
from lab.host.ksm import ksm_running, ksm_runs, merges_everything
from lab.host.process import wrapped

BEFORE = {
    "run": "0",
    "sleep_millisecs": "20",
    "pages_to_scan": "100",
    "smart_scan": "1",
    "advisor_mode": "none [scan-time]",
}
AFTERWARDS = BEFORE | {"advisor_mode": "scan-time"}
BOUND_S = 30.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, value in BEFORE.items():
        (tmp_path / name).write_text(f"{value}\n")
    return tmp_path


def settings(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text().strip() for path in folder.iterdir()}


def test_it_runs_at_full_speed_inside_the_context_and_as_before_after_it(folder: Path) -> None:
    assert not ksm_runs(folder)
    with ksm_running(folder):
        assert ksm_runs(folder)
        inside = settings(folder)
    assert inside["sleep_millisecs"] == "0"
    assert inside["smart_scan"] == "0"
    assert inside["advisor_mode"] == "none"
    assert int(inside["pages_to_scan"]) > 100_000
    assert settings(folder) == AFTERWARDS


def test_an_error_inside_the_context_restores_the_settings(folder: Path) -> None:
    with pytest.raises(KeyError), ksm_running(folder):
        raise KeyError
    assert settings(folder) == AFTERWARDS


def test_an_older_kernel_has_fewer_settings(folder: Path) -> None:
    for name in ("advisor_mode", "smart_scan"):
        (folder / name).unlink()
    with ksm_running(folder):
        assert ksm_runs(folder)
    assert settings(folder) == {"run": "0", "sleep_millisecs": "20", "pages_to_scan": "100"}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_who_is_killed_leaves_the_settings_as_they_were(folder: Path, how: signal.Signals) -> None:
    program = (
        "import pathlib, sys, time\n"
        "from lab.host.ksm import ksm_running\n"
        "with ksm_running(pathlib.Path(sys.argv[1])):\n"
        "    print('runs', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"runs\n"
        assert ksm_runs(folder)
        os.kill(process.pid, how)
        process.wait(BOUND_S)
    end = time.monotonic() + BOUND_S
    while settings(folder) != AFTERWARDS:
        assert time.monotonic() < end, settings(folder)
        time.sleep(0.01)


def test_two_can_not_have_it_running_at_once(folder: Path) -> None:
    with ksm_running(folder):
        with pytest.raises(TransientError, match="another process"), ksm_running(folder):
            pytest.fail("two at once")
        assert ksm_runs(folder)
    with ksm_running(folder):
        pass
    assert settings(folder) == AFTERWARDS


def test_a_kernel_without_ksm_is_named(tmp_path: Path) -> None:
    assert not ksm_runs(tmp_path)
    with pytest.raises(HostError, match="CONFIG_KSM"), ksm_running(tmp_path):
        pass


def test_qemu_is_not_merged_because_this_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Field report F2: what is merged as a whole hands that down to what it starts."""
    asked = "import ctypes; print(ctypes.CDLL(None).prctl(68, 0, 0, 0, 0))"
    prctl = ctypes.CDLL(None).prctl
    if prctl(67, 1, 0, 0, 0) != 0:
        pytest.skip("this process may not have all its memory merged, or the kernel is too old")
    try:
        assert merges_everything()
        for thp in (None, False):
            command = wrapped([sys.executable, "-c", asked], thp=thp)
            assert subprocess.run(command, capture_output=True).stdout == b"0\n"
    finally:
        prctl(67, 0, 0, 0, 0)
    assert not merges_everything()
