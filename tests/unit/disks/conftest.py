"""Disk images to try things with, made by the `qemu-img` of the lab's QEMU."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.errors import LabError
from lab.qemu.build import find_qemu


@pytest.fixture(scope="session")
def qemu_img() -> Path:
    """The lab's `qemu-img`, or the host's where the lab's is not built."""
    try:
        return find_qemu("unpatched").path.with_name("qemu-img")
    except LabError as error:
        if found := shutil.which("qemu-img"):
            return Path(found)
        pytest.skip(f"no qemu-img: {error}")


Make = Callable[..., Path]


def call(*command: str | Path) -> str:
    """Run a program to its good end, and return what it wrote."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.fixture
def make(qemu_img: Path, tmp_path: Path) -> Make:
    """A function that makes a disk image: name, format, size in MiB, and what it is on."""

    def made(
        name: str, format: str = "qcow2", *, mib: int = 1, on: Path | None = None, options: str = ""
    ) -> Path:
        path = tmp_path / name
        told = ["-o", options] if options else []
        if on is not None:
            told += ["-u", "-b", str(on), "-F", "raw" if on.suffix == ".raw" else "qcow2"]
        call(qemu_img, "create", "-q", "-f", format, *told, "--", path, f"{mib}M")
        return path

    return made
