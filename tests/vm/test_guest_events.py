"""What may happen to a guest or a machine while a live snapshot is taken changes neither the image
nor the snapshot after it.

Resets, balloons and device load are in test_device_load.py, the end of a guest in
test_qemu_ends.py.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import lab
from lab.errors import QmpError, RestoreError
from lab.session import VM
from lab.snapshot.mechanisms.base import Hold
from lab.snapshot.result import Snapshot
from lab.snapshot.take import take
from lab.verify import oracle
from lab.verify.oracle import verify_method
from tests.support.bench import Stand, info, is_left_alone, phases, until

pytestmark = [
    pytest.mark.vm,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.platforms("micro-tcg", "micro-kvm"),
]

METHODS_HERE = (
    "live",
    pytest.param("live-rfc", marks=pytest.mark.thorough),
    pytest.param("live-inline", marks=pytest.mark.thorough),
)
#: More than the engine's buffer holds, at a rate at which the rest takes a second, so that what
#: happens does so in the middle.
DEVICE = ("-device", "virtio-rng-pci,id=before")
MACHINE = lab.Machine(ram_mib=192, extra_args=DEVICE)
WORKLOAD = lab.Workload("random", wss_mib=96)
MIB_PER_S = 50

Event = Callable[[VM], Awaitable[None]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stand(platform: str) -> AsyncIterator[Stand]:
    stand = Stand(MACHINE, WORKLOAD)
    yield stand
    await stand.close()


@pytest_asyncio.fixture(loop_scope="module")
async def vm(stand: Stand) -> VM:
    return await stand.guest()


async def is_saving(vm: VM) -> bool:
    reply = await info(vm)
    # Until a snapshot has begun, QEMU tells of the one before.
    return reply.get("status") == "active" and phases(reply).get("sweep") is False


async def are_right(vm: VM, method: str, folder: Path, taken: Any) -> None:
    """Verify a snapshot that is taken by `taken`, and one after it that is taken as ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "take", taken)
        found = await verify_method(vm, method, folder)
    assert found.equal, found.detail
    await is_left_alone(vm)
    found = await verify_method(vm, method, folder)
    assert found.equal, found.detail


async def are_right_if_in_the_sweep(vm: VM, method: str, folder: Path, event: Event) -> None:
    async def taken(vm: VM, image: Path, method: str, **options: Any) -> Snapshot:
        options["storage_mib_per_s"] = MIB_PER_S
        task = asyncio.create_task(take(vm, image, method, **options))
        await until(lambda: is_saving(vm))
        await event(vm)
        return await task

    await are_right(vm, method, folder, taken)


async def are_right_if_at_the_instant(vm: VM, method: str, folder: Path, event: Event) -> None:
    async def taken(vm: VM, image: Path, method: str, **options: Any) -> Snapshot:
        hold: Hold = options.pop("hold")

        async def hold_and_happen() -> None:
            await hold()
            await event(vm)

        return await take(vm, image, method, hold=hold_and_happen, **options)

    await are_right(vm, method, folder, taken)


@pytest.mark.parametrize("method", METHODS_HERE)
async def test_a_guest_that_is_stopped_and_goes_on(vm: VM, method: str, tmp_path: Path) -> None:
    async def stop_and_go(vm: VM) -> None:
        for _ in range(5):
            await vm.stop()
            await vm.cont()

    await are_right_if_in_the_sweep(vm, method, tmp_path, stop_and_go)


async def refused(vm: VM, command: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(QmpError, match="migrat"):
        await vm.execute(command, arguments)


@pytest.mark.parametrize("method", METHODS_HERE)
async def test_devices_are_not_plugged_or_unplugged_meanwhile(
    vm: VM, method: str, tmp_path: Path
) -> None:
    async def plug(vm: VM) -> None:
        await refused(vm, "device_add", {"driver": "virtio-rng-pci", "id": "meanwhile"})
        await refused(vm, "device_del", {"id": "before"})

    await are_right_if_at_the_instant(vm, method, tmp_path, plug)


async def test_a_device_that_was_plugged_in_by_hand_is_missed_when_its_image_is_restored(
    tmp_path: Path,
) -> None:
    image = tmp_path / "a.snap"
    async with lab.boot(MACHINE, WORKLOAD) as vm:
        await vm.execute("device_add", {"driver": "virtio-rng-pci", "id": "by-hand"})
        await vm.snapshot(image, progress=False)
    with pytest.raises(RestoreError, match=r"virtio-rng.*including any hotplugged devices"):
        async with lab.restore(image):
            pass


@pytest.mark.parametrize("method", METHODS_HERE)
async def test_memory_that_is_added_meanwhile_is_not_in_the_image(
    vm: VM, method: str, tmp_path: Path
) -> None:
    name = f"extra-{method}"

    async def add(vm: VM) -> None:
        await vm.execute(
            "object-add", {"qom-type": "memory-backend-ram", "id": name, "size": 16 << 20}
        )

    await are_right_if_in_the_sweep(vm, method, tmp_path, add)
    await vm.execute("object-del", {"id": name})
    await is_left_alone(vm)
