"""A snapshot to storage that is slower than memory: the same image, later, and a guest that is left
alone whatever becomes of it.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

import lab
from lab.errors import SnapshotError, UsageError
from lab.measure.sample import take_sample
from lab.scenario.methods import METHODS, Variant
from lab.scenario.scenario import Scenario
from lab.scenario.storage import Storage
from lab.session import VM
from lab.snapshot.result import Snapshot
from lab.snapshot.throttle import BUFFER_BYTES
from lab.verify.oracle import verify_method
from tests.support.bench import Stand, is_left_alone, until, works_on
from tests.support.failing_disk import full_after

pytestmark = [
    pytest.mark.vm,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.platforms("tcg", "kvm", "micro-kvm"),
]

MIB = 1 << 20
RATE = 100
MACHINE = lab.Machine(ram_mib=256)
# So little that a precopy converges: QEMU stops the guest when what is left takes 300 ms.
WORKLOAD = lab.Workload("random", wss_mib=8)
STREAMS = [name for name, how in METHODS.items() if how.is_stream]


def methods_on(variant: Variant) -> list[str]:
    return [name for name in STREAMS if METHODS[name].runs_on(variant)]


def writers() -> list[int]:
    """Processes that write to storage of a limited rate for this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if any("slowdisk" in word for word in process.cmdline()):
                found.append(process.pid)
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stand(platform: str) -> AsyncIterator[Stand]:
    stand = Stand(MACHINE, WORKLOAD)
    yield stand
    await stand.close()


@pytest_asyncio.fixture(loop_scope="module")
async def vm(stand: Stand) -> VM:
    return await stand.guest()


async def begun(vm: VM, image: Path, method: str, rate: int) -> "asyncio.Task[Snapshot]":
    """Begin a snapshot, and return when some of it is in the file."""
    partial = image.with_name(image.name + ".partial")
    task = asyncio.create_task(
        vm.snapshot(image, method, progress=False, storage_mib_per_s=rate),
        name=f"{method} at {rate} MiB/s",
    )

    async def something_is_written() -> bool:
        assert not task.done()
        return partial.exists() and partial.stat().st_size > MIB

    await until(something_is_written)
    return task


@pytest.mark.parametrize("variant", ["patched", "unpatched"])
async def test_the_image_is_the_guest_at_its_instant(variant: Variant, tmp_path: Path) -> None:
    async with lab.boot(MACHINE, WORKLOAD, binary=variant) as vm:
        for method in methods_on(variant):
            found = await verify_method(vm, method, tmp_path, storage_mib_per_s=RATE)
            assert found.equal, f"{method}: {found.detail}"
            assert found.pages_compared >= 256 * 256
            await works_on(vm)
    assert list(tmp_path.iterdir()) == []
    assert writers() == []


async def test_a_snapshot_takes_as_long_as_its_image_at_the_rate(vm: VM, tmp_path: Path) -> None:
    image = tmp_path / "a.snap"
    for method in methods_on("patched"):
        taken = await vm.snapshot(image, method, progress=False, storage_mib_per_s=RATE)
        assert taken.storage_mib_per_s == taken.summary()["storage_mib_per_s"] == RATE
        assert taken.image_bytes == image.stat().st_size
        # All but what was on its way to the file when QEMU was through.
        written = taken.image_bytes - BUFFER_BYTES - MIB
        assert taken.duration_ms >= written / (RATE * MIB) * 1000, method
        await is_left_alone(vm)
    assert writers() == []
    async with lab.restore(image) as again:
        await works_on(again)


async def test_a_measured_run_names_the_rate_and_verifies_at_it(tmp_path: Path) -> None:
    storage = Storage(storage_mib_per_s=RATE)
    scenario = Scenario(machine=MACHINE, workload=WORKLOAD, method="live", storage=storage)
    sample = await take_sample(scenario, tmp_path / "image", verify=True)
    assert (sample.outcome, sample.figures["verified"]) == ("ok", True)
    written = sample.figures["image_bytes"] - BUFFER_BYTES - MIB
    assert sample.figures["duration_ms"] >= written / (RATE * MIB) * 1000
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", methods_on("patched"))
async def test_cancelled_midway_leaves_the_guest_running_no_process_and_no_file(
    vm: VM, method: str, tmp_path: Path
) -> None:
    # So slow that it is not over before it is cancelled.
    task = await begun(vm, tmp_path / "a.snap", method, 4)
    assert len(writers()) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(tmp_path.iterdir()) == []
    assert writers() == []
    await is_left_alone(vm)
    found = await verify_method(vm, method, tmp_path)
    assert found.equal, found.detail


async def test_a_cancelled_unpatched_background_snapshot_leaves_nothing(tmp_path: Path) -> None:
    async with lab.boot(MACHINE, WORKLOAD, binary="unpatched") as vm:
        task = await begun(vm, tmp_path / "a.snap", "background", 4)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert list(tmp_path.iterdir()) == []
        assert writers() == []
        await works_on(vm)


@pytest.mark.parametrize("method", ["live", "migrate-to-file"])
async def test_a_full_disk_is_named_and_leaves_no_file(
    vm: VM, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if others had filled it up since the lab looked.
    monkeypatch.setattr("lab.snapshot.take.check_disk", lambda *args: None)
    monkeypatch.setattr("lab.snapshot.attempt.room_bytes", lambda folder: 1 << 40)
    async with full_after(8 << 20) as folder:
        with pytest.raises(SnapshotError, match=f"{method} failed: No space left on device"):
            await vm.snapshot(folder / "a.snap", method, progress=False, storage_mib_per_s=RATE)
        assert list(folder.iterdir()) == []
    assert writers() == []
    await is_left_alone(vm)


async def test_a_writer_that_is_killed_fails_the_snapshot_and_not_the_guest(
    vm: VM, tmp_path: Path
) -> None:
    task = await begun(vm, tmp_path / "a.snap", "live", 4)
    (writer,) = writers()
    os.kill(writer, signal.SIGKILL)
    with pytest.raises(SnapshotError, match=r"live failed: .* ended by SIGKILL"):
        await task
    assert list(tmp_path.iterdir()) == []
    await is_left_alone(vm)


async def test_what_needs_a_file_is_refused_before_anything_happens(vm: VM, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="live-mapped writes here and there"):
        await vm.snapshot(tmp_path / "a.snap", "live-mapped", storage_mib_per_s=RATE)
    with pytest.raises(UsageError, match="storage_mib_per_s is -1"):
        await vm.snapshot(tmp_path / "a.snap", "live", storage_mib_per_s=-1)
    assert list(tmp_path.iterdir()) == []
