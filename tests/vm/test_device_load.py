"""The image is the guest at the pause instant, whoever writes to its memory meanwhile.

Besides vCPUs that is QEMU itself: its main loop, threads that do a disk's I/O, the kernel on their
behalf, and a reset.  Every image is judged by equality of every byte, see `lab.oracle`.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

import lab
from lab.errors import GuestError, HostError
from lab.guest.protocol import ProgressPage
from lab.host import require_kvm
from lab.oracle import Verification, verify_method
from lab.qmp import Event
from lab.rfb import viewing
from lab.scenario import DiskAio, DiskCache, DiskKind
from lab.vm import VM

pytestmark = pytest.mark.vm

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
) -> lab.Machine:
    return lab.Machine(
        ram_mib=256, vcpus=vcpus, disk=disk, disk_cache=cache, disk_aio=aio,
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
            ("live", "live-rfc", "live"),
            id="virtio-uncached-iothread",
        ),
        pytest.param(machine(vcpus=2, net=True), ENGINES, id="net"),
        pytest.param(machine(vnc=True), ENGINES, id="screen"),
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


async def test_memory_that_goes_into_the_balloon_meanwhile_is_in_the_image(tmp_path: Path) -> None:
    """QEMU takes the pages from the guest and, while a snapshot runs, does not discard them."""
    ram_bytes = 256 << 20
    async with lab.boot(ALL_DEVICES, WORKLOAD) as vm:

        async def inflate_to(size_bytes: int) -> None:
            await vm.execute("balloon", {"value": size_bytes})
            async with asyncio.timeout(BOUND_S):
                while (await vm.execute("query-balloon"))["actual"] != size_bytes:
                    await asyncio.sleep(0.01)

        for method in ENGINES:
            since = len(vm.qmp.events)
            judged = asyncio.create_task(verified(vm, method, tmp_path))
            try:
                await vm.qmp.wait_event(is_named("RESUME"), since=since, timeout_s=BOUND_S)
                await inflate_to(ram_bytes - (48 << 20))
            finally:
                await judged
            # And what is in the balloon when it is taken is the image's as well.
            await verified(vm, method, tmp_path)
            await inflate_to(ram_bytes)
            await devices_work(vm)


async def test_a_screen_that_nobody_serves_is_an_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="no screen") as caught:
        async with viewing(tmp_path / "vnc"):
            pass
    assert "\n" not in str(caught.value)


async def test_memory_is_that_of_the_pause_instant_under_kvm(tmp_path: Path) -> None:
    try:
        require_kvm()
    except HostError as error:
        pytest.skip(str(error))
    async with lab.boot(
        lab.Machine(ram_mib=256, vcpus=4, accel="kvm", disk="virtio", net=True, vnc=True),
        lab.Workload("random", wss_mib=48, threads=4),
    ) as vm:
        for method in ENGINES:
            await verified(vm, method, tmp_path)
            await devices_work(vm)
