"""What this process may not use is refused by name, before anything happens or without ending the
guest, and a run that was held back by a limit says so.
"""

import contextlib
import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lab
from lab.errors import HostError, SnapshotError
from lab.figures.stamp import stamp_text
from lab.runs.sets import load_set
from lab.scenario.machine import RamKind
from lab.session import VM
from lab.snapshot.take import take
from lab.vm.ram import QEMU_OVERHEAD_MIB
from tests.support.bench import is_left_alone
from tests.support.cgroups import PERIOD_US, LimitedGroup, limited_group
from tests.support.failing_disk import full_after

pytestmark = [pytest.mark.vm, pytest.mark.platforms("micro-tcg")]

MIB = 1 << 20
PATIENCE_S = 300.0
GUEST = ("--guest=micro", "--workload=idle", "--wss-mib=16")


def run_lab(
    group: LimitedGroup, *arguments: str, status: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a command of the lab's in a control group, and assert its exit status."""
    command = group.command([sys.executable, "-m", "lab", *arguments])
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def test_a_guest_that_its_control_group_has_no_memory_for_is_refused() -> None:
    """Field report F9."""
    with limited_group("memory", 700 * MIB) as group:
        done = run_lab(group, "boot", *GUEST, "--ram-mib=1024", "--seconds=0.1", status=2)
        (line,) = done.stderr.splitlines()
        needed = 1024 + QEMU_OVERHEAD_MIB
        assert re.search(rf"1024 MiB of guest RAM need {needed} MiB .* 700 MiB of the cgroup", line)
        assert group.name in line
        run_lab(group, "boot", *GUEST, "--ram-mib=128", "--seconds=0.1")
        # Where there is so little, nothing of use can be measured.
        checks = json.loads(run_lab(group, "doctor", "--json", status=2).stdout)["checks"]
        (memory,) = [check for check in checks if check["name"] == "memory"]
        assert memory["status"] == "fail"
        assert group.name in memory["detail"]


async def test_an_image_that_its_control_group_has_no_memory_for_is_not_restored(
    tmp_path: Path,
) -> None:
    image = tmp_path / "a.snap"
    machine = lab.Machine(ram_mib=1024, guest="micro")
    async with lab.boot(machine, lab.Workload("idle", wss_mib=16)) as vm:
        await vm.snapshot(image, progress=False)
    with limited_group("memory", 700 * MIB) as group:
        done = run_lab(group, "restore", str(image), "--seconds=0.1", status=2)
        assert group.name in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_guest_that_its_control_group_has_no_threads_for_is_refused() -> None:
    with limited_group("pids", 16) as group:
        done = run_lab(group, "boot", *GUEST, "--ram-mib=64", "--seconds=0.1", status=2)
        assert re.search(rf"QEMU needs \d+ threads.* 16 .*{group.name} \(pids.max\)", done.stderr)


def test_a_run_that_was_held_back_by_a_quota_says_so(tmp_path: Path) -> None:
    """Field report F9."""
    out = tmp_path / "set"
    plan = ("--method=live", "--guest=micro", "--ram-mib=64", "--wss-mib=8", "--repeats=1")
    with limited_group("cpu", PERIOD_US * 7 // 10) as group:
        run_lab(group, "measure", *plan, f"--out={out}", f"--image-dir={tmp_path}")
        checks = json.loads(run_lab(group, "doctor", "--json").stdout)["checks"]
    (cpu,) = [check for check in checks if check["name"] == "cpu"]
    assert cpu["status"] == "warn"
    assert group.name in cpu["detail"]
    measured = load_set(out)
    (run,) = measured.runs
    assert run.record.host["limits"]["cpu_quota"] == 0.7
    assert run.throttled is not None
    assert 0 < run.throttled.throttled_periods <= run.throttled.periods
    assert run.throttled.throttled_ms > 0
    assert "held back by a CPU quota in 1 of 1 boots" in stamp_text(measured)
    assert any("quota" in warning for warning in run.record.warnings)


@contextlib.contextmanager
def lowered(name: str, soft: int, pid: int = 0) -> Iterator[None]:
    number = getattr(resource, f"RLIMIT_{name}")
    before = resource.prlimit(pid, number)
    resource.prlimit(pid, number, (soft, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, number, before)


@pytest.mark.parametrize("kind", ["memfd", "memfd-private", "file"])
async def test_ram_in_a_file_that_may_not_be_so_large_is_refused(kind: RamKind) -> None:
    """Field report F19."""
    machine = lab.Machine(ram_mib=64, guest="micro", ram_kind=kind)
    with lowered("FSIZE", 32 * MIB), pytest.raises(HostError, match=r"RLIMIT_FSIZE.*ulimit -f"):
        async with lab.boot(machine, lab.Workload("idle", wss_mib=8)):
            pytest.fail("it was booted")


async def test_too_few_descriptors_are_refused() -> None:
    machine = lab.Machine(ram_mib=64, guest="micro")
    with lowered("NOFILE", 60), pytest.raises(HostError, match=r"RLIMIT_NOFILE.*ulimit -n"):
        async with lab.boot(machine, lab.Workload("idle", wss_mib=8)):
            pytest.fail("it was booted")


METHODS_HERE = ("live", "live-inline", "live-mapped", "migrate-to-file")


async def fails(vm: VM, image: Path, method: str, said: str) -> None:
    with pytest.raises(SnapshotError, match=said) as caught:
        await vm.snapshot(image, method, progress=False)
    assert "\n" not in str(caught.value)
    await is_left_alone(vm)
    assert list(image.parent.iterdir()) == []


async def test_an_image_larger_than_a_file_may_be_fails_and_the_guest_runs_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field report F19."""
    machine, workload = lab.Machine(ram_mib=192, guest="micro"), lab.Workload(wss_mib=144)
    image = tmp_path / "a.snap"
    async with lab.boot(machine, workload) as vm:
        for method in METHODS_HERE:
            with lowered("FSIZE", 16 * MIB, vm.pid):
                await fails(vm, image, method, "RLIMIT_FSIZE")
        # Where that is not foreseen, QEMU finds out and is not ended by it.
        monkeypatch.setattr("lab.snapshot.take.check_disk", lambda *args: None)
        for method in METHODS_HERE:
            with lowered("FSIZE", 16 * MIB, vm.pid):
                await fails(vm, image, method, r"\(RLIMIT_FSIZE\).*ulimit -f")
        await vm.snapshot(image, progress=False)


async def test_a_guest_that_writes_faster_than_its_disk_does_not_fill_it() -> None:
    """Field report F11."""
    # Eight times its RAM is more than the disk has.
    machine, workload = lab.Machine(ram_mib=64, guest="micro"), lab.Workload(wss_mib=48)
    disk_mib = 320
    async with lab.boot(machine, workload) as vm, full_after(disk_mib * MIB) as folder:
        with pytest.raises(SnapshotError) as caught:
            await vm.snapshot(
                folder / "a.snap", "migrate-to-file", progress=False, storage_mib_per_s=80
            )
        given_up = re.search(r"given up at (\d+) MiB", str(caught.value))
        assert given_up, caught.value
        # It is looked at ten times a second, which is 8 MiB at this rate; a busy host takes longer.
        assert disk_mib // 2 < int(given_up[1]) < disk_mib
        assert "reserve" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert list(folder.iterdir()) == []
        await is_left_alone(vm)


@pytest.mark.parametrize("method", ["live", "live-inline"])
async def test_a_disk_that_others_fill_is_left_to_them(method: str) -> None:
    """Field report F11."""
    machine, workload = lab.Machine(ram_mib=64, guest="micro"), lab.Workload(wss_mib=48)
    async with lab.boot(machine, workload) as vm, full_after(256 * MIB) as folder:
        filler = folder / "others"

        async def fill() -> None:
            filler.write_bytes(bytes(250 * MIB))

        with pytest.raises(SnapshotError, match="before it took the last of the disk"):
            await take(vm, folder / "a.snap", method, storage_mib_per_s=8, hold=fill)
        assert list(folder.iterdir()) == [filler]
        await is_left_alone(vm)
        filler.unlink()
        await vm.snapshot(folder / "a.snap", method, progress=False)
