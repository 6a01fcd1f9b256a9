"""The set-up routine, with stand-ins for the programs that would change the machine."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT


class Checkout:
    """A copy of what the set-up routine reads, and a PATH where dpkg, apt and id are stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        self.bin = folder / "bin"
        self.calls_file = folder / "calls"
        self.root.joinpath("lab").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("pyproject.toml", "lab/bootstrap.sh", "lab/debian-packages.txt"):
            shutil.copy(ROOT / name, self.root / name)
        self.program(self.root / ".venv/bin/python", 'case "$1" in -m) record ;; esac')

    def program(self, path: Path, body: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        record = f'record() {{ echo "{path.name} $args" >> "{self.calls_file}"; }}'
        path.write_text(f'#!/bin/sh\nargs="$*"\n{record}\n{body}\n')
        path.chmod(0o755)

    def host(self, *, user: int, installed: bool) -> None:
        listing = "installed" if installed else "not-installed"
        self.program(
            self.bin / "dpkg-query",
            f'shift 2; for name in "$@"; do echo "{listing} $name"; done',
        )
        self.program(self.bin / "id", f"echo {user}")
        self.program(self.bin / "apt-get", "record")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", self.root / "lab/bootstrap.sh", *arguments],
            env={**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_the_script_is_shell_that_parses() -> None:
    subprocess.run(["sh", "-n", ROOT / "lab/bootstrap.sh"], check=True)


def test_without_root_the_one_command_to_run_is_printed(checkout: Checkout) -> None:
    checkout.host(user=1000, installed=False)

    done = checkout.run()

    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "sudo apt-get install --no-install-recommends python3 " in done.stderr
    assert "seabios" in done.stderr
    assert checkout.calls == []


def test_recorded_notebooks_do_not_wait_for_packages(checkout: Checkout) -> None:
    checkout.host(user=1000, installed=False)

    done = checkout.run("--packages-optional")

    assert done.returncode == 0
    assert "sudo apt-get install" in done.stderr


def test_root_installs_what_is_missing(checkout: Checkout) -> None:
    checkout.host(user=0, installed=False)

    done = checkout.run()

    assert done.returncode == 0
    (install,) = [call for call in checkout.calls if call.startswith("apt-get install")]
    assert " --no-install-recommends " in install
    assert install.split()[4:5] == ["python3"]


def test_a_failed_installation_is_reported(checkout: Checkout) -> None:
    checkout.host(user=0, installed=False)
    checkout.program(checkout.bin / "apt-get", "exit 100")

    done = checkout.run()

    assert done.returncode != 0


def test_python_requirements_are_installed_once_until_they_change(checkout: Checkout) -> None:
    checkout.host(user=1000, installed=True)

    assert [checkout.run().returncode, checkout.run().returncode] == [0, 0]
    assert len(checkout.calls) == 1
    assert "pip install" in checkout.calls[0]

    with checkout.root.joinpath("pyproject.toml").open("a") as file:
        file.write("# changed\n")
    checkout.run()
    assert len(checkout.calls) == 2


def test_an_installation_that_failed_is_tried_again(checkout: Checkout) -> None:
    checkout.host(user=1000, installed=True)
    python = checkout.root / ".venv/bin/python"
    checkout.program(python, 'case "$1" in -m) exit 1 ;; esac')
    assert checkout.run().returncode != 0

    checkout.program(python, 'case "$1" in -m) record ;; esac')
    assert checkout.run().returncode == 0
    assert len(checkout.calls) == 1


def test_an_unknown_argument_is_refused(checkout: Checkout) -> None:
    checkout.host(user=1000, installed=True)

    assert checkout.run("--packages-optonal").returncode == 2
