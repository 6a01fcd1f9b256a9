"""While the image's disk does not answer, the guest goes on until there is no room any more to copy
pages to, and then only who writes to a page that is not saved waits.  QEMU answers, and can be
told to give the snapshot up, disk or no disk.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import lab
from lab.errors import QmpError
from lab.scenario.methods import METHODS
from lab.session import VM
from lab.snapshot.mechanisms.base import Hold
from lab.snapshot.result import Snapshot
from lab.snapshot.take import take
from lab.verify import oracle
from lab.verify.oracle import verify_method
from tests.support.bench import (
    Stand,
    begin,
    ended,
    info,
    is_left_alone,
    phases,
    until,
    until_phase,
    until_status,
    waiting_writers,
    works_on,
)
from tests.support.failing_disk import Mount, stalling
from tests.support.outgoing import outgoing

pytestmark = [
    pytest.mark.vm,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.platforms("tcg", "kvm", "micro-kvm"),
]

METHODS_HERE = ("live-inline", "live-rfc", "live", "live-mapped")
DISK_MIB = 512
PAGE_BYTES = 4096

#: How long QEMU may take to answer before it is taken to hang, in seconds.
ANSWER_S = 5.0


def machine(vcpus: int) -> tuple[lab.Machine, lab.Workload]:
    """A guest that has more to write to than the buffer holds."""
    return (
        lab.Machine(ram_mib=192, vcpus=vcpus),
        lab.Workload("random", wss_mib=64, threads=vcpus),
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stand(platform: str) -> AsyncIterator[Stand]:
    stand = Stand(*machine(vcpus=1))
    yield stand
    await stand.close()


@pytest_asyncio.fixture(loop_scope="module")
async def vm(stand: Stand) -> VM:
    return await stand.guest()


async def guest_waits(vm: VM) -> None:
    """Wait until the one vCPU waits for a page, and for nothing that comes soon."""
    seen = 0

    async def reached() -> bool:
        nonlocal seen
        seen = seen + 1 if waiting_writers(vm) == 1 else 0
        return seen > 20

    await until(reached)


async def answered(vm: VM) -> dict[str, Any] | None:
    """What QEMU says about its migration, None if it hangs: a waiting vCPU holds its big lock."""
    try:
        reply: dict[str, Any] = await vm.qmp.execute("query-migrate", timeout_s=ANSWER_S)
    except QmpError:
        return None
    return reply


async def test_guest_goes_on_until_the_buffer_is_full(tmp_path: Path) -> None:
    async with lab.boot(*machine(vcpus=2)) as vm, outgoing(vm) as target:
        await begin(vm, "live", target.channels)
        reply: dict[str, Any] | None = None

        async def reached() -> bool:
            nonlocal reply
            reply = await answered(vm)
            if reply is None:
                # One waits with the big lock held, which is rare, but not impossible: on with it.
                for _ in range(1000):
                    await target.read()
                return False
            return bool(reply["snapshot"]["buffer-waits"]) and waiting_writers(vm) == 2

        await until(reached)
        assert reply is not None
        snapshot, buffer = reply["snapshot"], 32 << 20
        # Full but for what the sweep needs, and for less than a fault may take.
        assert buffer - (2 << 20) - 64 * PAGE_BYTES <= snapshot["buffer-max"] <= buffer
        assert snapshot["pages-copied"] >= snapshot["buffer-max"] // PAGE_BYTES
        # Nobody but the writers waits, and they do not get on.
        assert await vm.is_running()
        before = await vm.progress_page()
        again = await info(vm)
        assert (await vm.progress_page()).total_ops == before.total_ops
        assert again["snapshot"]["pages-copied"] == snapshot["pages-copied"]

        await target.drain(tmp_path / "image")
        await ended(vm, "completed")
        await is_left_alone(vm)


@pytest.mark.parametrize("method", ["live-inline", "live-rfc", "live"])
async def test_reader_gone_while_the_guest_waits(vm: VM, method: str, tmp_path: Path) -> None:
    async with outgoing(vm) as target:
        await begin(vm, method, target.channels)
        await target.while_reading(until_phase(vm, "sweep"))
        await guest_waits(vm)
        target.close()
        await ended(vm, "failed")
    await is_left_alone(vm)
    found = await verify_method(vm, method, tmp_path)
    assert found.equal, found.detail


@pytest.mark.parametrize("method", METHODS_HERE)
async def test_image_is_right_after_a_stall(
    vm: VM, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stalling(tmp_path / "disk", DISK_MIB) as disk:

        async def thaw_later() -> None:
            await guest_waits(vm)
            if METHODS[method].engine == "copy":
                # What it takes is put aside, apart from the buffer.
                await stop_and_go_on(vm)
                await guest_waits(vm)
            await disk.thaw()

        async def take_stalled(vm: VM, image: Path, method: str, **options: Any) -> Snapshot:
            hold: Hold = options.pop("hold")
            tasks: list[asyncio.Task[None]] = []

            async def hold_and_freeze() -> None:
                await hold()
                await disk.freeze()
                tasks.append(asyncio.create_task(thaw_later()))

            taken = await take(vm, image, method, hold=hold_and_freeze, **options)
            await asyncio.gather(*tasks)
            return taken

        monkeypatch.setattr(oracle, "take", take_stalled)
        found = await verify_method(vm, method, disk.folder)
        assert found.equal, found.detail
    await is_left_alone(vm)


async def stall_on_disk(vm: VM, method: str, disk: Mount) -> None:
    """Begin a snapshot onto a disk that stops to answer, and wait until the guest waits for it."""
    await begin(vm, method, disk.folder / "image", hold=True)
    await until_status(vm, "pre-switchover")
    await disk.freeze()
    await vm.execute("migrate-continue", {"state": "pre-switchover"})
    await guest_waits(vm)


async def yank(vm: VM) -> None:
    await vm.qmp.execute("yank", {"instances": [{"type": "migration"}]}, out_of_band=True)


@pytest.mark.parametrize("how", ["migrate_cancel", "yank"])
@pytest.mark.parametrize("method", METHODS_HERE)
async def test_given_up_while_the_disk_does_not_answer(
    vm: VM, method: str, how: str, tmp_path: Path
) -> None:
    async with stalling(tmp_path / "disk", DISK_MIB) as disk:
        await stall_on_disk(vm, method, disk)
        if how == "yank" or await answered(vm) is None:
            # The monitor's thread does it, though the main thread may hang.
            await yank(vm)
            end = "failed"
        else:
            await vm.execute("migrate_cancel")
            end = "cancelled"
        # The disk is as it was, and so is the snapshot thread; but the guest runs.
        await works_on(vm)
        assert waiting_writers(vm) == 0
        assert (await info(vm))["status"] in ("active", "cancelling")
        await works_on(vm)

        await disk.thaw()
        reply = await ended(vm, end)
        if end == "failed":
            assert "released unsaved" in reply["error-desc"]
    await is_left_alone(vm)
    found = await verify_method(vm, method, tmp_path)
    assert found.equal, found.detail


@pytest.mark.parametrize("method", METHODS_HERE)
async def test_qemu_answers_while_the_disk_does_not(vm: VM, method: str, tmp_path: Path) -> None:
    """A command that is refused waits for nobody, with the guest's writer waiting for its page.

    Field report F7.
    """
    async with stalling(tmp_path / "disk", DISK_MIB) as disk:
        await stall_on_disk(vm, method, disk)
        if METHODS[method].engine != "copy" and await answered(vm) is None:
            # These engines let the guest wait with QEMU's big lock held, if it has it.
            await yank(vm)
        for driver in ("virtio-rng-pci", "no-such-device"):
            with pytest.raises(QmpError, match=r"migrating|not a valid"):
                await vm.qmp.execute("device_add", {"driver": driver}, timeout_s=ANSWER_S)
        assert await answered(vm) is not None
        await disk.thaw()
        await ended(vm, "completed", "failed")
    await is_left_alone(vm)


@pytest.mark.parametrize("method", METHODS_HERE)
async def test_no_rate_that_is_set_meanwhile_holds_the_guest_up(
    vm: VM, method: str, tmp_path: Path
) -> None:
    await begin(vm, method, tmp_path / "image", hold=True)
    await until_status(vm, "pre-switchover")
    # With which it would take hours.
    await vm.execute("migrate-set-parameters", {"max-bandwidth": 4096})
    await vm.execute("migrate-continue", {"state": "pre-switchover"})
    await ended(vm, "completed")
    await is_left_alone(vm)


async def stop_and_go_on(vm: VM) -> None:
    """QEMU waits for the vCPU to leave the guest, and that waits for a page."""
    await vm.qmp.execute("stop", timeout_s=ANSWER_S)
    await vm.qmp.execute("cont", timeout_s=ANSWER_S)


@pytest.mark.parametrize("method", ["live", "live-mapped"])
async def test_the_guest_can_be_stopped_while_the_disk_does_not_answer(
    vm: VM, method: str, tmp_path: Path
) -> None:
    async with stalling(tmp_path / "disk", DISK_MIB) as disk:
        await stall_on_disk(vm, method, disk)
        for _ in range(3):
            await stop_and_go_on(vm)
            await guest_waits(vm)
        await disk.thaw()
        await ended(vm, "completed")
    await is_left_alone(vm)


@pytest.mark.parametrize("method", ["live-inline", "live-rfc", "live"])
async def test_qemu_answers_while_not_even_the_first_byte_is_taken(vm: VM, method: str) -> None:
    """Nothing is protected yet, and nobody waits.  Field report F7."""
    async with outgoing(vm) as target:
        target.fill()
        await begin(vm, method, target.channels)
        for _ in range(10):
            reply = await answered(vm)
            assert reply is not None
            assert "setup" not in phases(reply) or not phases(reply)["setup"]
            await works_on(vm)
        await vm.execute("migrate_cancel")
        await ended(vm, "cancelled")
    await is_left_alone(vm)


@pytest.mark.platforms("tcg")
@pytest.mark.parametrize("method", ["live", "live-mapped"])
async def test_qemu_answers_while_it_writes_to_the_guest_itself(
    method: str, tmp_path: Path
) -> None:
    """The main loop writes to a protected page, and there is no room to copy it to.

    Field report F7.
    """
    load = lab.Machine(ram_mib=192, balloon=True), lab.Workload("random", wss_mib=64)
    async with (
        lab.boot(*load) as vm,
        stalling(tmp_path / "disk", DISK_MIB) as disk,
    ):
        path = await balloon_path(vm)
        interval = {"path": path, "property": "guest-stats-polling-interval", "value": 1}
        await stall_on_disk(vm, method, disk)
        copied: int = (await info(vm))["snapshot"]["pages-copied"]
        # The answer of a second ago is handed back to the guest, in a ring in its memory.
        await vm.qmp.execute("qom-set", interval, timeout_s=ANSWER_S)

        async def written() -> bool:
            reply = await answered(vm)
            assert reply is not None, "QEMU does not answer"
            return int(reply["snapshot"]["pages-copied"]) > copied

        await until(written)
        assert waiting_writers(vm) == 1
        await vm.qmp.execute("migrate_cancel", timeout_s=ANSWER_S)
        await works_on(vm)
        await disk.thaw()
        await ended(vm, "cancelled")
        await is_left_alone(vm)
        found = await verify_method(vm, method, tmp_path)
        assert found.equal, found.detail


async def balloon_path(vm: VM) -> str:
    """Where QEMU keeps the balloon; the guest has answered once how much memory it has."""
    for folder in ("peripheral-anon", "peripheral"):
        for entry in await vm.execute("qom-list", {"path": f"/machine/{folder}"}):
            if entry["type"].startswith("child<virtio-balloon"):
                return f"/machine/{folder}/{entry['name']}"
    raise AssertionError("there is no balloon")
