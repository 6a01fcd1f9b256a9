"""The image is the guest at the pause instant, whoever writes to its memory meanwhile.

Besides vCPUs that is QEMU itself: its main loop, threads that do a disk's I/O, the kernel on their
behalf, and a reset.  Every image is judged by equality of every byte, see `lab.verify.oracle`.
"""

import asyncio
import contextlib
import dataclasses
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

import lab
from lab.errors import GuestError, HostError
from lab.guests.protocol import ProgressPage
from lab.host.needs import require_kvm
from lab.scenario.machine import Chipset, DiskAio, DiskCache, DiskKind
from lab.session import VM
from lab.snapshot.image import read_sidecar
from lab.verify.oracle import Verification, verify_method
from lab.verify.soak.screen import viewing
from lab.vm.qmp import Event

pytestmark = [pytest.mark.vm, pytest.mark.thorough]
log = logging.getLogger(__name__)

BOUND_S = 120
ENGINES = ("live", "live-rfc", "live-inline")
WORKLOAD = lab.Workload("random", wss_mib=48)


def is_named(name: str) -> Callable[[Event], bool]:
    return lambda event: event.name == name


def device_counts(machine: lab.Machine, page: ProgressPage) -> dict[str, int]:
    """What the guest did with each device that the machine has."""
    counts = {}
    if machine.disk != "none":
        counts["disk"] = page.disk_ops
    if machine.net:
        counts["net"] = page.net_packets
    if machine.vnc:
        counts["display"] = page.display_writes
    return counts


async def devices_work(vm: VM, more: int = 20) -> None:
    """Assert that each device gets so much more done, without an error, and the writers too."""
    first = await vm.progress_page()
    before = device_counts(vm.machine, first)
    async with asyncio.timeout(BOUND_S):
        while True:
            page = await vm.progress_page()
            now = device_counts(vm.machine, page)
            if page.total_ops > first.total_ops and all(
                now[name] >= before[name] + more for name in now
            ):
                break
            await asyncio.sleep(0.01)
    assert (page.page_errors, page.device_errors) == (0, 0), vm.console.tail()


async def verified(vm: VM, method: str, folder: Path) -> Verification:
    found = await verify_method(vm, method, folder)
    assert found.equal, f"{method} of {vm.machine}: {found.detail}"
    return found


async def verified_during(
    vm: VM, method: str, folder: Path, disturb: Callable[[], Awaitable[None]]
) -> Verification:
    """Judge a snapshot during whose sweep something happens, which begins right after the pause."""
    since = len(vm.qmp.events)
    judged = asyncio.create_task(verified(vm, method, folder))
    try:
        await vm.qmp.wait_event(is_named("RESUME"), since=since, timeout_s=BOUND_S)
        await disturb()
    finally:
        found = await judged
    return found


def machine(
    disk: DiskKind = "none",
    cache: DiskCache = "writeback",
    aio: DiskAio = "threads",
    *,
    vcpus: int = 1,
    iothread: bool = False,
    net: bool = False,
    vnc: bool = False,
    balloon: bool = False,
    chipset: Chipset = "pc",
) -> lab.Machine:
    return lab.Machine(
        ram_mib=256, vcpus=vcpus, disk=disk, disk_cache=cache, disk_aio=aio, chipset=chipset,
        disk_iothread=iothread, net=net, vnc=vnc, balloon=balloon,
    )  # fmt: skip


ALL_DEVICES = machine("virtio", "none", "native", vcpus=2, net=True, vnc=True, balloon=True)


@contextlib.asynccontextmanager
async def watched(vm: VM) -> AsyncIterator[None]:
    """Have somebody look at the screen, if there is one."""
    if not vm.machine.vnc:
        yield
        return
    async with viewing(vm.files.vnc) as viewer:
        await viewer.wait_updates(2, timeout_s=BOUND_S)
        yield
        # The screen goes on being shown, also after a snapshot.
        await viewer.wait_updates(viewer.updates + 2, timeout_s=BOUND_S)
        assert (viewer.width, viewer.height) == (640, 480)


@pytest.mark.parametrize(
    ("load", "methods"),
    [
        pytest.param(machine("ide", vcpus=2), ("live", "live-rfc"), id="ide"),
        pytest.param(machine("ide", "none", "native"), ("live", "live-inline"), id="ide-uncached"),
        pytest.param(machine("virtio", vcpus=3), ("live", "live-inline"), id="virtio"),
        pytest.param(
            machine("virtio", "none", "native", vcpus=4, iothread=True),
            ("live", "live-rfc"),
            id="virtio-uncached-iothread",
        ),
        pytest.param(machine("scsi", vcpus=2, chipset="q35"), ("live", "live-rfc"), id="scsi-q35"),
        pytest.param(machine(vcpus=2, net=True), ("live", "live-rfc"), id="net"),
        pytest.param(machine(vnc=True), ("live", "live-inline"), id="screen"),
    ],
)
async def test_memory_is_that_of_the_pause_instant_while_devices_write_to_it(
    load: lab.Machine, methods: tuple[str, ...], tmp_path: Path
) -> None:
    workload = lab.Workload("random", wss_mib=48, threads=load.vcpus)
    async with lab.boot(load, workload) as vm, watched(vm):
        await devices_work(vm)
        for method in methods:
            await verified(vm, method, tmp_path)
            await devices_work(vm)
    assert list(tmp_path.iterdir()) == []


async def test_a_restored_guest_goes_on_using_its_devices(tmp_path: Path) -> None:
    image = tmp_path / "a.snap"
    async with lab.boot(ALL_DEVICES, WORKLOAD) as vm:
        await devices_work(vm)
        await vm.snapshot(image, progress=False)
        await devices_work(vm)
    async with lab.restore(image) as again, watched(again):
        await devices_work(again)
        await verified(again, "live", tmp_path)


@pytest.mark.parametrize("disk", ["virtio", "scsi"])
async def test_a_disk_with_a_thread_of_its_own_goes_on_however_often_the_guest_is_stopped(
    disk: DiskKind,
) -> None:
    """No interrupt is lost when the thread stops.  Field report F5."""
    async with lab.boot(machine(disk, "none", iothread=True), WORKLOAD) as vm:
        for _ in range(20):
            for _ in range(10):
                await vm.stop()
                await vm.cont()
            await devices_work(vm, more=3)


async def test_memory_that_goes_into_the_balloon_meanwhile_is_in_the_image(tmp_path: Path) -> None:
    """QEMU takes the pages from the guest and, while a snapshot runs, does not discard them."""
    ram_bytes = 256 << 20
    async with lab.boot(ALL_DEVICES, WORKLOAD) as vm:

        async def resize_to(size_bytes: int) -> None:
            await vm.execute("balloon", {"value": size_bytes})
            async with asyncio.timeout(BOUND_S):
                while (await vm.execute("query-balloon"))["actual"] != size_bytes:
                    await asyncio.sleep(0.01)

        async def inflate() -> None:
            await resize_to(ram_bytes - (48 << 20))

        for method in ("live", "live-inline"):
            await verified_during(vm, method, tmp_path, inflate)
            # And what is in the balloon when it is taken is the image's as well.
            await verified(vm, method, tmp_path)
            await resize_to(ram_bytes)
            await devices_work(vm)


async def test_a_reset_during_the_sweep_is_not_in_the_image(tmp_path: Path) -> None:
    """It writes to RAM and to ROMs; the image shows neither."""
    async with lab.boot(machine("ide", vnc=True), WORKLOAD) as vm:
        for method in ENGINES:
            in_time = False
            for _ in range(10):
                since = len(vm.qmp.events)
                found = await verified_during(vm, method, tmp_path, vm.reset)
                assert found.replay is not None
                reset, *_ = (e for e in vm.qmp.events[since:] if e.name == "RESET")
                end, *_ = (e for e in vm.qmp.events[since:] if e.data.get("status") == "completed")
                await vm.wait_ready()
                if in_time := reset.time_us < end.time_us:
                    break
            assert in_time, f"{method} was always quicker than the reset"
        await devices_work(vm)


async def test_a_guest_is_taken_at_any_moment_of_its_boot_and_boots_on(tmp_path: Path) -> None:
    image = tmp_path / "a.snap"
    rng = random.Random(1)
    async with lab.boot(ALL_DEVICES, WORKLOAD) as vm:
        for method in ("live", "live-rfc", "live"):
            await vm.reset()
            # Whatever moment it is: each is as good as any other.
            await asyncio.sleep(rng.uniform(0, 1.5))
            found = await verified(vm, method, tmp_path)
            assert found.replay is None
        await vm.reset()
        await vm.snapshot(image, progress=False)
        assert read_sidecar(image).ready is None
        await vm.wait_ready()
        await devices_work(vm)
        first = vm.ready.nonce
    async with lab.restore(image) as again:
        assert not again.is_ready
        with pytest.raises(GuestError, match="not ready yet"):
            await again.progress_page()
        await again.wait_ready()
        assert again.ready.nonce != first
        await devices_work(again)


async def test_a_guest_that_restarts_by_itself_still_ends_qemu_after_a_reset() -> None:
    """A machine starts over when that is asked for; then QEMU is as it was before."""
    async with lab.boot(machine(), WORKLOAD) as vm:
        nonce = vm.ready.nonce
        await vm.reset()
        await vm.wait_ready()
        assert vm.ready.nonce != nonce
        await vm.execute("system_reset")
        assert await vm.process.wait(BOUND_S)


async def test_a_disk_with_a_thread_of_its_own_works_on_however_often_the_guest_is_stopped() -> (
    None
):
    """A completion of which nobody tells the guest would leave it waiting for ever."""
    load = machine("virtio", "none", "native", vcpus=2, iothread=True)
    async with lab.boot(load, lab.Workload("idle", wss_mib=16)) as vm:
        for _ in range(150):
            await vm.stop()
            await vm.cont()
            await devices_work(vm)


async def test_a_screen_that_nobody_serves_is_an_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="no screen") as caught:
        async with viewing(tmp_path / "vnc"):
            pass
    assert "\n" not in str(caught.value)


async def test_memory_is_that_of_the_pause_instant_under_kvm(tmp_path: Path) -> None:
    try:
        require_kvm("linux")
    except HostError as error:
        pytest.skip(str(error))
    async with lab.boot(
        lab.Machine(ram_mib=256, vcpus=4, accel="kvm", disk="virtio", net=True, vnc=True),
        lab.Workload("random", wss_mib=48, threads=4),
    ) as vm:
        for method in ENGINES:
            await verified(vm, method, tmp_path)
            await devices_work(vm)


# Minutes of everything at once


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(4))
async def test_random_machines_are_judged_equal_while_anything_happens(
    seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    for _ in range(4):
        iothread = rng.random() < 0.5
        load = dataclasses.replace(
            rng.choice(
                [
                    machine("ide", "writeback", "threads"),
                    machine("ide", "none", "native"),
                    machine("virtio", "writeback", "threads", iothread=iothread),
                    machine("virtio", "none", "threads", iothread=iothread),
                    machine("virtio", "none", "native", iothread=iothread),
                ]
            ),
            ram_mib=rng.choice([256, 512]),
            vcpus=rng.randint(1, 4),
            thp=rng.choice([None, False]),
            net=rng.random() < 0.7,
            vnc=rng.random() < 0.7,
            balloon=True,
        )
        workload = lab.Workload(
            rng.choice(["random", "sequential", "idle"]), wss_mib=48, threads=load.vcpus,
            seed=rng.randrange(1 << 30),
        )  # fmt: skip
        async with lab.boot(load, workload) as vm, watched(vm):
            await devices_work(vm)
            for _ in range(6):
                method = rng.choice([*ENGINES, "live-mapped", "live", "live"])
                disturb = rng.choice(["nothing", "nothing", "reset", "balloon"])
                log.info("seed %d: %s, %s, %s, %s", seed, method, disturb, load, workload)
                await _judge_once(vm, method, disturb, rng, tmp_path)


async def _judge_once(vm: VM, method: str, disturb: str, rng: random.Random, folder: Path) -> None:
    size_bytes = (vm.machine.ram_mib << 20) - rng.randrange(16, 64) * (1 << 20)

    async def resize_balloon() -> None:
        await vm.execute("balloon", {"value": size_bytes})

    if disturb == "reset":
        await verified_during(vm, method, folder, vm.reset)
        if rng.random() < 0.5:
            await asyncio.sleep(rng.uniform(0, 2))
            await verified(vm, method, folder)
    elif disturb == "balloon":
        await verified_during(vm, method, folder, resize_balloon)
    else:
        await verified(vm, method, folder)
    await vm.wait_ready()
    await devices_work(vm)
