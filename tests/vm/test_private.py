"""QEMU may do no more than it needs, and nobody else may look at what it has."""

import os
import stat
from pathlib import Path

import pytest

import lab
from tests.support.bench import is_left_alone, small

pytestmark = [pytest.mark.vm, pytest.mark.platforms("micro-tcg", "micro-kvm")]

METHODS_HERE = ("live", "live-rfc", "live-inline", "live-mapped", "migrate-to-file")
FILTERED = "2"
"""SECCOMP_MODE_FILTER, of <linux/seccomp.h>."""


def seccomp_modes(pid: int) -> set[str]:
    """How each thread of a process is restricted."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = (task / "status").read_text().splitlines()
        found |= {line.split()[1] for line in lines if line.startswith("Seccomp:")}
    return found


@pytest.mark.parametrize("method", METHODS_HERE)
async def test_every_method_works_in_qemus_sandbox(method: str, tmp_path: Path) -> None:
    async with lab.boot(*small()) as vm:
        assert seccomp_modes(vm.pid) == {FILTERED}
        await vm.snapshot(tmp_path / "a.snap", method, progress=False)
        await is_left_alone(vm)
    async with lab.restore(tmp_path / "a.snap") as again:
        assert seccomp_modes(again.pid) == {FILTERED}
        await is_left_alone(again)


async def test_nobody_else_can_read_what_a_snapshot_leaves(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        async with lab.boot(*small()) as vm:
            await vm.snapshot(tmp_path / "a.snap", progress=False)
            folder = vm.process.workdir
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert (folder / "faults.bin").exists()
            for path in (folder / "faults.bin", *tmp_path.iterdir()):
                assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    finally:
        os.umask(before)
