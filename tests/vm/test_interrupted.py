"""A snapshot that is cancelled or fails, in whatever phase and for whatever reason, leaves the
guest running, nothing protected, nobody waiting, no image that could be taken for a complete one,
and a QEMU that takes the next snapshot.

The file system that is full is one, the reader that goes away is one, and so is the limit on
descriptors. Where a phase is too short to be hit by chance, QEMU is held in it by a gate in front
of its system calls (`gate.py`).
"""

import asyncio
import contextlib
import dataclasses
import errno
import json
import mmap
import os
import re
import resource
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from lab.errors import LabError, QmpError, SnapshotError
from lab.guests.protocol import PAGE_BYTES, ProgressPage
from lab.host.process import wrapped
from lab.scenario.methods import MAPPED_RAM, METHODS
from lab.session import VM
from lab.snapshot.image import file_channel
from lab.snapshot.mechanisms.base import Hold
from lab.snapshot.result import Snapshot
from lab.snapshot.take import take
from lab.verify.oracle import verify_method
from tests.support.bench import (
    Stand,
    begin,
    configure,
    ended,
    info,
    is_left_alone,
    is_open,
    phases,
    protected_mappings,
    small,
    start,
    until,
    until_idle,
    until_phase,
    until_status,
    userfaults,
    works_on,
)
from tests.support.failing_disk import full_after, stalling
from tests.support.gate import Gates
from tests.support.gate import gates as gates_of_guests
from tests.support.outgoing import outgoing

pytestmark = [
    pytest.mark.vm,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.platforms("tcg", "kvm", "micro-kvm"),
]

STREAMS = ("live-inline", "live-rfc", "live")
METHODS_HERE = (*STREAMS, "live-mapped")
NO_SPACE = "No space left on device"


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gates]:
    with gates_of_guests(tmp_path_factory.mktemp("gates")) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stand(gates: Gates, platform: str) -> AsyncIterator[Stand]:
    # Small pages take long enough to protect that `copy` does it ahead of the pause.
    machine, workload = small(thp=False)
    # A second block of RAM, so that a snapshot can fail between two.
    machine = dataclasses.replace(machine, extra_args=("-device", "VGA"))
    stand = Stand(machine, workload)
    yield stand
    await stand.close()


@pytest_asyncio.fixture(loop_scope="module")
async def vm(stand: Stand) -> VM:
    return await stand.guest()


async def whole_image(vm: VM, method: str, folder: Path) -> os.stat_result:
    """Return what a file would be like that has an image of the guest as it is now."""
    image = folder / "whole"
    await begin(vm, method, image)
    await ended(vm, "completed")
    status = image.stat()
    image.unlink()
    return status


async def next_one_is_right(vm: VM, method: str, folder: Path) -> None:
    """Assert that the next snapshot works, and is equal byte for byte."""
    await is_left_alone(vm)
    found = await verify_method(vm, method, folder)
    assert found.equal, found.detail
    await is_left_alone(vm)


# Phase by phase: each of these has QEMU in its phase while the context lasts, and gives a way to
# send it a command then.

Say = Callable[[str], Awaitable[Any]]
Phase = Callable[[VM, Gates, str, Path], contextlib.AbstractAsyncContextManager[Say]]


@contextlib.asynccontextmanager
async def in_populate(vm: VM, gates: Gates, method: str, folder: Path) -> AsyncIterator[Say]:
    # To open a FIFO for writing waits for a reader; the log is opened first of all.
    log = folder / "log"
    os.mkfifo(log)
    try:
        await begin(vm, method, folder / "image", x_snapshot_fault_log=str(log))
        await until_phase(vm, "populate")
        yield vm.execute
    finally:
        reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
        await until_idle(vm)
        os.close(reader)
        log.unlink()


@contextlib.asynccontextmanager
async def in_arm_ahead(vm: VM, gates: Gates, method: str, folder: Path) -> AsyncIterator[Say]:
    await configure(vm, method)
    # The first pieces are protected, and the guest runs into them.
    with gates.held("protect", skip=3):
        await start(vm, folder / "image")
        await gates.reached("protect")
        yield vm.execute


@contextlib.asynccontextmanager
async def in_hold(vm: VM, gates: Gates, method: str, folder: Path) -> AsyncIterator[Say]:
    await begin(vm, method, folder / "image", hold=True)
    await until_status(vm, "pre-switchover")
    assert not await vm.is_running()
    yield vm.execute


@contextlib.asynccontextmanager
async def in_sweep(vm: VM, gates: Gates, method: str, folder: Path) -> AsyncIterator[Say]:
    async with outgoing(vm) as target:
        await begin(vm, method, target.channels)
        await target.while_reading(until_phase(vm, "sweep"))

        async def say(command: str) -> Any:
            return await target.while_reading(vm.execute(command))

        yield say


@contextlib.asynccontextmanager
async def in_sweep_of_file(vm: VM, gates: Gates, method: str, folder: Path) -> AsyncIterator[Say]:
    async with stalling(folder / "disk", 512) as disk:
        await begin(vm, method, disk.folder / "image", hold=True)
        await until_status(vm, "pre-switchover")
        await disk.freeze()
        await vm.execute("migrate-continue", {"state": "pre-switchover"})
        await until_phase(vm, "sweep")
        yield vm.execute
        await disk.thaw()
        await until_idle(vm)


@contextlib.asynccontextmanager
async def in_complete(vm: VM, gates: Gates, method: str, folder: Path) -> AsyncIterator[Say]:
    size = (await whole_image(vm, method, folder)).st_size
    async with outgoing(vm) as target:
        await begin(vm, method, target.channels)
        await target.until_complete_phase(vm, size)
        yield vm.execute


def phases_of(method: str) -> dict[str, Phase]:
    found: dict[str, Phase] = {"populate": in_populate}
    if METHODS[method].engine == "copy":
        found["arm-ahead"] = in_arm_ahead
    found["hold"] = in_hold
    if method in STREAMS:
        return found | {"sweep": in_sweep, "complete": in_complete}
    # What needs a file cannot be sent through a socket.
    return found | {"sweep": in_sweep_of_file}


@pytest.mark.parametrize("method", METHODS_HERE)
async def test_cancelled_in_any_phase(vm: VM, gates: Gates, method: str, tmp_path: Path) -> None:
    for phase, reach in phases_of(method).items():
        async with reach(vm, gates, method, tmp_path) as say:
            assert phases(await say("query-migrate")).get(phase) is False, phase
            await say("migrate_cancel")
        await ended(vm, "cancelled")
        await is_left_alone(vm)
    await next_one_is_right(vm, method, tmp_path)


async def test_cancelled_too_late_is_complete(vm: VM, gates: Gates, tmp_path: Path) -> None:
    """All is saved; what is still to be done is to release memory."""
    await configure(vm, "live")
    with gates.held("unregister"):
        await start(vm, tmp_path / "image")
        await gates.reached("unregister")
        await vm.execute("migrate_cancel")
        assert (await info(vm))["status"] == "completed"
    await ended(vm, "completed")
    await next_one_is_right(vm, "live", tmp_path)


# Write errors


async def refuses_to_restore(vm: VM, method: str, image: Path) -> None:
    """Assert that QEMU takes what was written of an image for what it is: not an image."""
    machine = vm.machine
    arguments = ["-M", "pc", "-accel", "tcg", "-m", f"{machine.ram_mib}M", "-nodefaults"]
    arguments += ["-display", "none", "-S", "-incoming", "defer", "-qmp", "stdio"]
    arguments += machine.extra_args
    mapped = MAPPED_RAM in METHODS[method].capabilities
    capabilities = [{"capability": MAPPED_RAM, "state": mapped}]
    commands = [
        {"execute": "qmp_capabilities"},
        {"execute": "migrate-set-capabilities", "arguments": {"capabilities": capabilities}},
        {"execute": "migrate-incoming", "arguments": {"channels": file_channel(image)}},
    ]
    process = await asyncio.create_subprocess_exec(
        *wrapped([str(vm.binary.path), *arguments], thp=None),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stderr is not None
    try:
        process.stdin.write("".join(json.dumps(each) for each in commands).encode())
        async with asyncio.timeout(60):
            # It ends by itself, as nothing can become of it; its input stays open.
            said = (await process.stderr.read()).decode()
            assert await process.wait() == 1, said
        assert "load of migration failed" in said or "error" in said.lower(), said
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("method", [*METHODS_HERE, "live-direct"])
async def test_disk_full_at_any_byte(vm: VM, method: str, tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    # A guest that is stopped has the same image each time, so that the last bytes can be hit; the
    # other sizes are hit while it runs.
    await vm.stop()
    status = await whole_image(vm, method, shm if shm.is_dir() else tmp_path)
    whole = status.st_blocks * 512
    async with full_after(whole - 8192) as folder:
        await begin(vm, method, folder / "image")
        failed = await ended(vm, "failed")
        assert phases(failed).get("complete") is False, failed
        assert NO_SPACE in failed["error-desc"]
        assert not await vm.is_running()
        await refuses_to_restore(vm, method, folder / "image")
    assert userfaults(vm) == protected_mappings(vm) == 0
    await vm.cont()

    for room in (4096, 65536, whole // 2):
        async with full_after(room) as folder:
            await begin(vm, method, folder / "image")
            failed = await ended(vm, "failed")
            # Of an error while a migration is set up QEMU says only that there is one, and of one
            # in the middle of a write to a page's place, how far it got.
            if phases(failed)["setup"]:
                assert re.search(f"{NO_SPACE}|Partial write", failed["error-desc"])
            await is_left_alone(vm)
            if room > 65536:
                await refuses_to_restore(vm, method, folder / "image")
    await next_one_is_right(vm, method, tmp_path)


async def test_disk_full_leaves_no_file(vm: VM, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if others had filled it up since the lab looked.
    monkeypatch.setattr("lab.snapshot.take.check_disk", lambda *args: None)
    monkeypatch.setattr("lab.snapshot.attempt.room_bytes", lambda folder: 1 << 40)
    monkeypatch.setattr("lab.host.room.reserve_bytes", lambda size_bytes: 0)
    async with full_after(4 << 20) as folder:
        with pytest.raises(SnapshotError, match=NO_SPACE):
            await vm.snapshot(folder / "a.snap", "live", progress=False)
        assert list(folder.iterdir()) == []
    await is_left_alone(vm)


# The reader goes away


@pytest.mark.parametrize("method", STREAMS)
async def test_reader_gone_in_any_phase(vm: VM, method: str, tmp_path: Path) -> None:
    size = (await whole_image(vm, method, tmp_path)).st_size
    for phase in ("setup", "hold", "sweep", "complete"):
        async with outgoing(vm) as target:
            await configure(vm, method, hold=phase == "hold")
            if phase == "setup":
                target.close()
            await start(vm, target.channels)
            if phase == "hold":
                await until_status(vm, "pre-switchover")
                target.close()
                await vm.execute("migrate-continue", {"state": "pre-switchover"})
            elif phase == "sweep":
                await target.while_reading(until_phase(vm, "sweep"))
            elif phase == "complete":
                await target.until_complete_phase(vm, size)
            target.close()
            failed = await ended(vm, "failed")
            assert phase == "hold" or phases(failed).get(phase) is False, failed
        await is_left_alone(vm)
    await next_one_is_right(vm, method, tmp_path)


# Resources of the host run out


@pytest.mark.parametrize("method", [*METHODS_HERE, "live-direct"])
async def test_out_of_descriptors_at_any_one(vm: VM, method: str, tmp_path: Path) -> None:
    """QEMU may open ever more files, until that is enough."""
    pid, (soft, hard) = vm.pid, resource.prlimit(vm.pid, resource.RLIMIT_NOFILE)
    await configure(vm, method, x_snapshot_fault_log=str(tmp_path / "log"))
    in_use = {int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    free = [number for number in range(len(in_use) + 32) if number not in in_use]
    reasons = []
    for limit in free:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, hard))
        try:
            await start(vm, tmp_path / "image")
            reply = await ended(vm, "completed", "failed")
        except QmpError as error:
            # Not even the image: there is no snapshot that could have failed.
            reasons.append(error.cause)
            continue
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        await is_left_alone(vm)
        if reply["status"] == "completed":
            break
        reasons.append(reply["error-desc"])
    else:
        pytest.fail(f"it never worked: {reasons}")
    # The image and the log; what an engine needs beyond that.
    assert len(reasons) >= 3, reasons
    await next_one_is_right(vm, method, tmp_path)


async def test_out_of_memory_for_the_buffer(vm: VM, tmp_path: Path) -> None:
    pid, (soft, hard) = vm.pid, resource.prlimit(vm.pid, resource.RLIMIT_AS)
    in_use = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * mmap.PAGESIZE
    # Much less than the buffer, and much more than all else that QEMU may want.
    resource.prlimit(pid, resource.RLIMIT_AS, (in_use + (1 << 30), hard))
    try:
        await begin(vm, "live", tmp_path / "image", x_snapshot_buffer_size=2 << 30)
        failed = await ended(vm, "failed")
    finally:
        resource.prlimit(pid, resource.RLIMIT_AS, (soft, hard))
    assert "buffer" in failed["error-desc"]
    await configure(vm, "live", x_snapshot_buffer_size=32 << 20)
    await next_one_is_right(vm, "live", tmp_path)


@pytest.mark.parametrize("method", METHODS_HERE)
async def test_the_kernel_refuses(vm: VM, gates: Gates, method: str, tmp_path: Path) -> None:
    """Every call that protects memory fails once, in the pause or ahead of it."""
    await configure(vm, method)
    # Of two blocks that are protected, the first and the second.
    for call, skip in (("register", 0), ("register", 1), ("protect", 0), ("protect", 1)):
        with gates.failing(call, skip=skip):
            await start(vm, tmp_path / "image")
            failed = await ended(vm, "failed")
            assert gates.hits(call) > 0
        assert failed["error-desc"]
        await is_left_alone(vm)
    await next_one_is_right(vm, method, tmp_path)


@pytest.mark.parametrize("method", METHODS_HERE)
async def test_the_kernel_refuses_to_release(
    vm: VM, gates: Gates, method: str, tmp_path: Path
) -> None:
    """It fails with the kernel's reason, and nobody waits although the kernel goes on refusing.

    Field report F8.
    """
    await configure(vm, method)
    for error, skip in ((errno.EAGAIN, 20), (errno.EINVAL, 40)):
        with gates.failing("release", error=error, skip=skip):
            await start(vm, tmp_path / "image")
            failed = await ended(vm, "failed")
            assert gates.hits("release") > 0
            await is_left_alone(vm)
        assert "release" in failed["error-desc"]
        assert os.strerror(error) in failed["error-desc"]
    await next_one_is_right(vm, method, tmp_path)


@pytest.mark.parametrize("method", ["live", "live-mapped"])
async def test_the_kernel_refuses_to_release_while_the_disk_does_not_answer(
    vm: VM, gates: Gates, method: str, tmp_path: Path
) -> None:
    """Nobody waits for the disk only because the kernel refuses.  Field report F8."""
    async with stalling(tmp_path / "disk", 512) as disk:
        await begin(vm, method, disk.folder / "image", hold=True)
        await until_status(vm, "pre-switchover")
        await disk.freeze()
        # The sweep releases its first chunk, and stops at writing it; the rest are faults.
        with gates.failing("release", error=errno.EINVAL, skip=2):
            await vm.execute("migrate-continue", {"state": "pre-switchover"})
            await gates.reached("release")
            await works_on(vm)
            await works_on(vm)
        await disk.thaw()
        failed = await ended(vm, "failed")
        assert os.strerror(errno.EINVAL) in failed["error-desc"]
    await next_one_is_right(vm, method, tmp_path)


@pytest.mark.parametrize("method", METHODS_HERE)
async def test_the_file_can_not_be_closed(
    vm: VM, gates: Gates, method: str, tmp_path: Path
) -> None:
    """What only closing tells, as with NFS or a quota, is an error, and the image is no image."""
    with gates.failing("close", error=errno.EDQUOT):
        await begin(vm, method, tmp_path / "image")
        reply = await ended(vm, "completed")
    assert os.strerror(errno.EDQUOT) in reply["error-desc"]
    (tmp_path / "image").unlink()

    with (
        gates.failing("close", error=errno.EDQUOT),
        pytest.raises(SnapshotError, match=os.strerror(errno.EDQUOT)),
    ):
        await take(vm, tmp_path / "a.snap", method, fault_log=False)
    assert list(tmp_path.iterdir()) == []
    await next_one_is_right(vm, method, tmp_path)


async def test_the_file_that_is_open_a_second_time_can_not_be_closed(
    vm: VM, gates: Gates, tmp_path: Path
) -> None:
    """Pages bypass the page cache by a descriptor of their own, which tells as well."""
    with gates.failing("close", error=errno.EDQUOT):
        await begin(vm, "live-direct", tmp_path / "image")
        reply = await ended(vm, "failed")
    assert os.strerror(errno.EDQUOT) in reply["error-desc"]
    await next_one_is_right(vm, "live-direct", tmp_path)


def file_system_of(folder: Path) -> str:
    return subprocess.check_output(["stat", "-f", "-c", "%T", folder], text=True).strip()


@pytest.mark.parametrize(
    ("method", "call", "writes"), [("live", "truncate", 16), ("live-direct", "close", 0)]
)
async def test_the_guest_does_not_wait_while_a_failed_snapshot_ends_with_its_file(
    vm: VM, gates: Gates, method: str, call: str, writes: int, tmp_path: Path
) -> None:
    """A disk that has failed to write may not answer either when it is told to cut or close."""
    if file_system_of(tmp_path) == "tmpfs":
        pytest.skip("no room is reserved on tmpfs, and not every one can be written to directly")
    await begin(vm, method, tmp_path / "image", hold=True)
    await until_status(vm, "pre-switchover")
    # Room is reserved with the first chunk.
    with gates.held(call), gates.held("write", skip=writes):
        await vm.execute("migrate-continue", {"state": "pre-switchover"})
        await gates.reached("write")
        with gates.failing("write", error=errno.EIO):
            await gates.reached(call)
            await works_on(vm)
            await works_on(vm)
    reply = await ended(vm, "failed")
    assert os.strerror(errno.EIO) in reply["error-desc"]
    await next_one_is_right(vm, method, tmp_path)


async def test_a_snapshot_cancelled_in_the_hold_does_not_wait_for_the_file(
    vm: VM, gates: Gates, tmp_path: Path
) -> None:
    await begin(vm, "live-direct", tmp_path / "image", hold=True)
    await until_status(vm, "pre-switchover")
    with gates.held("close"):
        await vm.execute("migrate_cancel")
        await gates.reached("close")
        # The VM was stopped, and QEMU can be asked.
        await works_on(vm)
        assert (await info(vm))["status"] == "cancelling"
    await ended(vm, "cancelled")
    await next_one_is_right(vm, "live-direct", tmp_path)


@pytest.mark.parametrize("method", METHODS_HERE)
async def test_another_one_at_once_after_the_first(vm: VM, method: str, tmp_path: Path) -> None:
    """It is refused in one line as long as the first is not cleaned up.  Field report F21."""
    refusals = []
    for number in range(3):
        await begin(vm, method, tmp_path / f"first-{number}")
        await until_status(vm, "completed")
        while True:
            try:
                await start(vm, tmp_path / "second")
                break
            except QmpError as error:
                refusals.append(error.cause)
        await ended(vm, "completed")
        await is_left_alone(vm)
    assert all("cleaned up" in each for each in refusals)
    await next_one_is_right(vm, method, tmp_path)


# Who asked for the snapshot goes away


@pytest.mark.parametrize("method", METHODS_HERE)
async def test_task_cancelled_in_any_phase(
    vm: VM, gates: Gates, method: str, tmp_path: Path
) -> None:
    held = asyncio.Event()

    async def hold() -> None:
        held.set()
        await asyncio.Event().wait()

    async def cancel(task: asyncio.Task[Snapshot]) -> None:
        task.cancel()
        # It is taking back the snapshot until QEMU has ended it.
        await asyncio.wait([task])
        assert task.cancelled()
        assert list(tmp_path.iterdir()) == []
        await is_left_alone(vm)

    def snapshot(hold: Hold | None = None) -> asyncio.Task[Snapshot]:
        return asyncio.create_task(take(vm, tmp_path / "a.snap", method, hold=hold))

    # The first thing that is sent to QEMU, and each after it.
    for turns in range(0, 40, 5):
        task = snapshot()
        for _ in range(turns):
            await asyncio.sleep(0)
        await cancel(task)
    task = snapshot(hold)
    await held.wait()
    await cancel(task)
    task = snapshot()
    await until_phase(vm, "sweep")
    await cancel(task)
    await next_one_is_right(vm, method, tmp_path)


async def cut(vm: VM) -> None:
    """Close the monitor's connection, as a client does that dies."""
    with contextlib.suppress(EOFError, OSError):
        await vm.qmp._client.disconnect()


async def goes_on_unattended(vm: VM, progress_address: int, image: Path) -> None:
    """Assert that the snapshot ends and the guest runs on, without asking QEMU."""

    def operations() -> int:
        return ProgressPage.decode(vm.read_host(progress_address, PAGE_BYTES)).total_ops

    async def through() -> bool:
        return not is_open(vm, image) and userfaults(vm) == 0

    await until(through)
    assert protected_mappings(vm) == 0
    before = operations()

    async def moved() -> bool:
        return operations() > before

    await until(moved)
    assert image.stat().st_size > vm.workload.wss_mib << 20


@pytest.mark.parametrize("phase", ["populate", "arm-ahead", "sweep"])
async def test_monitor_gone(vm: VM, gates: Gates, phase: str, tmp_path: Path) -> None:
    """Nobody can tell QEMU anything any more: it completes what it has begun."""
    address, image = await vm.host_address(vm.ready.progress_gpa), tmp_path / "image"
    if phase == "populate":
        log = tmp_path / "log"
        os.mkfifo(log)
        await begin(vm, "live", image, x_snapshot_fault_log=str(log))
        await until_phase(vm, phase)
        await cut(vm)
        reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
        await goes_on_unattended(vm, address, image)
        os.close(reader)
    elif phase == "arm-ahead":
        await configure(vm, "live")
        with gates.held("protect", skip=3):
            await start(vm, image)
            await gates.reached("protect")
            await cut(vm)
        await goes_on_unattended(vm, address, image)
    else:
        async with outgoing(vm) as target:
            await begin(vm, "live", target.channels)
            await target.while_reading(until_phase(vm, phase))
            await cut(vm)
            await target.drain(image)
            await goes_on_unattended(vm, address, image)


@pytest.mark.parametrize("phase", ["hold", "sweep"])
async def test_monitor_gone_leaves_no_file(vm: VM, phase: str, tmp_path: Path) -> None:
    held = asyncio.Event()

    async def hold() -> None:
        held.set()
        await cut(vm)

    task = asyncio.create_task(
        take(
            vm,
            tmp_path / "a.snap",
            "live-inline",
            hold=hold if phase == "hold" else None,
        )
    )
    if phase == "sweep":
        await until_phase(vm, phase)
        await cut(vm)
    with pytest.raises(LabError) as caught:
        await task
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
