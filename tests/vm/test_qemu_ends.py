"""When QEMU or its guest ends in the middle of a snapshot, that is told in one line, an older image
of the same name is as good as before, and nothing else is left.
"""

import asyncio
import dataclasses
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

import lab
from lab.errors import LaunchError, QmpError
from lab.guests.protocol import kernel_command_line
from lab.session import VM
from lab.snapshot.result import Snapshot
from lab.snapshot.sidecar import sidecar_path
from lab.snapshot.take import take
from tests.support.bench import small, until_phase
from tests.support.cgroups import limited_group

pytestmark = [
    pytest.mark.vm,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.platforms("micro-tcg", "micro-kvm"),
]

METHODS_HERE = ("live", "live-rfc", "live-inline")
#: At this rate a snapshot takes longer than any test of it.
SLOW_MIB_PER_S = 1


async def by_quit(vm: VM) -> None:
    # It may be gone before it answers.
    try:
        await vm.qmp.execute("quit")
    except QmpError:
        assert vm.qmp.is_lost


async def by_sigterm(vm: VM) -> None:
    os.kill(vm.pid, signal.SIGTERM)


async def by_sigkill(vm: VM) -> None:
    os.kill(vm.pid, signal.SIGKILL)


async def by_its_guest(vm: VM) -> None:
    """A guest that resets its machine ends QEMU, which the lab starts with -no-reboot."""
    await vm.execute("system_reset")


End = Callable[[VM], Awaitable[None]]
ENDS: dict[str, tuple[End, str]] = {
    "quit": (by_quit, "exited with status 0"),
    "SIGTERM": (by_sigterm, "exited with status 0"),
    "SIGKILL": (by_sigkill, "was ended by SIGKILL"),
    "guest": (by_its_guest, "exited with status 0"),
}


@pytest_asyncio.fixture(loop_scope="module")
async def older(platform: str, tmp_path: Path) -> AsyncIterator[Path]:
    """An image of another guest, in the place where the next one is to be."""
    image = tmp_path / "a.snap"
    async with lab.boot(*small()) as vm:
        await vm.snapshot(image, "live", progress=False)
    before = image.read_bytes(), sidecar_path(image).read_bytes()
    yield image
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.snap", "a.snap.json"]
    assert (image.read_bytes(), sidecar_path(image).read_bytes()) == before
    async with lab.restore(image) as again:
        assert await again.is_running()


async def fails(task: asyncio.Task[Snapshot], vm: VM, said: str) -> None:
    with pytest.raises(LaunchError) as caught:
        await task
    assert said in str(caught.value)
    assert "snapshot" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert vm.process.exit_code is not None


@pytest.mark.parametrize("how", ["quit", "SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("method", METHODS_HERE)
async def test_qemu_ends_while_it_holds_its_guest(older: Path, method: str, how: str) -> None:
    end, said = ENDS[how]
    held = asyncio.Event()

    async def hold() -> None:
        held.set()
        await asyncio.Event().wait()

    async with lab.boot(*small()) as vm:
        task = asyncio.create_task(take(vm, older, method, hold=hold))
        await held.wait()
        await end(vm)
        # Who holds it is told by nobody, and asks.
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        with pytest.raises(LaunchError, match=said):
            await vm.status()


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("method", METHODS_HERE)
async def test_qemu_ends_while_it_saves_memory(older: Path, method: str, how: str) -> None:
    end, said = ENDS[how]
    async with lab.boot(*small()) as vm:
        task = asyncio.create_task(take(vm, older, method, storage_mib_per_s=SLOW_MIB_PER_S))
        await until_phase(vm, "sweep")
        await end(vm)
        await fails(task, vm, said)


@pytest.mark.thorough
@pytest.mark.platforms("tcg")
async def test_the_guest_panics_while_its_memory_is_saved(older: Path) -> None:
    machine, workload = small()
    # The second of two command lines is the one that QEMU takes.
    line = kernel_command_line(
        kind=workload.kind, wss_mib=workload.wss_mib, threads=workload.threads, seed=workload.seed
    )
    arguments = ("-append", f"{line} unknown_nmi_panic")
    async with lab.boot(dataclasses.replace(machine, extra_args=arguments), workload) as vm:
        task = asyncio.create_task(take(vm, older, "live", storage_mib_per_s=SLOW_MIB_PER_S))
        await until_phase(vm, "sweep")
        await vm.execute("inject-nmi")
        await fails(task, vm, "exited with status 0")
        assert "Kernel panic" in vm.console.text


@pytest.mark.parametrize("how", ["quit", "SIGKILL"])
async def test_qemu_ends_while_it_writes_to_a_file(older: Path, how: str) -> None:
    end, said = ENDS[how]
    async with lab.boot(*small()) as vm:
        task = asyncio.create_task(take(vm, older, "live-mapped"))
        await until_phase(vm, "setup")
        await end(vm)
        await fails(task, vm, said)


async def test_qemu_may_have_no_more_memory(older: Path) -> None:
    """The kernel kills it when the engine's buffer is more than its group may have.

    Field report F9: the error says so.
    """
    async with lab.boot(*small()) as vm:
        # Besides what it has.
        with limited_group("memory", 4 << 20) as group:
            group.add(vm.pid)
            task = asyncio.create_task(take(vm, older, "live"))
            await fails(task, vm, "was ended by SIGKILL")
            with pytest.raises(
                LaunchError, match=rf"4 MiB of the cgroup .*{group.name} .* used up"
            ):
                await vm.status()
