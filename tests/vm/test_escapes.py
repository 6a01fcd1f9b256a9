"""What writes to guest memory past the write protection is refused, and named, before anything is
done to the guest; by every engine, by the lab where QEMU would not, and not where nothing is wrong.
"""

import asyncio
import contextlib
import mmap
import os
import shutil
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import lab
from lab.errors import HostError, SnapshotError, TransientError
from lab.host.ksm import KSM, ksm_running
from lab.host.workdir import private_folder
from lab.qemu.build import find_qemu
from lab.scenario.machine import RamKind
from lab.scenario.methods import METHODS, Variant
from lab.session import VM
from lab.verify.oracle import verify_method
from lab.vm.ram import ram_dir
from tests.support.bench import begin, ended, is_left_alone, until, until_status, works_on

pytestmark = [pytest.mark.vm, pytest.mark.platforms("micro-tcg")]

LIVE = tuple(
    name
    for name, how in METHODS.items()
    if how.mechanism == "background" and how.runs_on("patched") and not how.direct_io
)
ENGINES = ("live", "live-rfc", "live-inline")
WORKLOAD = lab.Workload("random", wss_mib=4)
RAM_MIB = 32
STORAGE_DAEMON = "qemu-storage-daemon"


def machine(*extra: str, ram_kind: RamKind = "anon") -> lab.Machine:
    return lab.Machine(guest="micro", ram_mib=RAM_MIB, ram_kind=ram_kind, extra_args=extra)


async def assert_refused(vm: VM, method: str, image: Path, said: str) -> None:
    """Assert that a snapshot is refused in a line that says why, and that nothing came of it."""
    since = len(vm.qmp.events)
    with pytest.raises(SnapshotError, match=said) as caught:
        await vm.snapshot(image, method, progress=False)
    assert "\n" not in str(caught.value)
    assert "STOP" not in [event.name for event in vm.qmp.events[since:]]
    assert not image.exists()
    await is_left_alone(vm)


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not the test's own: its name is too long for a socket.
    with private_folder("lab-outside-") as made:
        yield made


@contextlib.asynccontextmanager
async def disk_of_another_process(folder: Path) -> AsyncIterator[tuple[str, ...]]:
    """QEMU's arguments for a disk that qemu-storage-daemon serves, for as long as it does."""
    if shutil.which(STORAGE_DAEMON) is None:
        pytest.skip(f"there is no {STORAGE_DAEMON}; see lab/debian-packages.txt")
    path = folder / "disk"
    daemon = await asyncio.create_subprocess_exec(
        STORAGE_DAEMON,
        *("--blockdev", "driver=null-co,node-name=disk,size=1048576"),
        *("--export", f"vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={path}"),
    )
    try:

        async def there() -> bool:
            assert daemon.returncode is None
            return path.exists()

        await until(there)
        yield (
            *("-chardev", f"socket,id=outside,path={path}"),
            *("-device", "vhost-user-blk-pci,id=served,chardev=outside"),
        )
    finally:
        with contextlib.suppress(ProcessLookupError):
            daemon.terminate()
        await daemon.wait()


async def offers(binary: Variant, device: str) -> bool:
    """Whether a QEMU was built with a device."""
    listing = await asyncio.create_subprocess_exec(
        find_qemu(binary).path, "-device", "help", stdout=asyncio.subprocess.PIPE
    )
    said, _ = await listing.communicate()
    return f'"{device}"' in said.decode()


@pytest.mark.parametrize("binary", ["patched", "unpatched"])
async def test_a_disk_that_another_process_serves_is_refused_and_one_of_qemus_own_is_right(
    binary: Variant, folder: Path, tmp_path: Path
) -> None:
    """Field report F1, and F22: what is true of one vhost-user device is true of all."""
    methods = LIVE if binary == "patched" else ("background",)
    if not await offers(binary, "vhost-user-blk-pci"):
        pytest.skip(f"the {binary} QEMU that was named has no vhost-user-blk")
    async with (
        disk_of_another_process(folder) as disk,
        lab.boot(machine(*disk, ram_kind="memfd"), WORKLOAD, binary=binary) as vm,
    ):
        for method in methods:
            said = "chardev 'outside'" if binary == "patched" else r"device served \(vhost-user-"
            await assert_refused(vm, method, tmp_path / "a.snap", said)
    own = (
        *("-blockdev", "driver=null-co,node-name=disk,size=1048576"),
        *("-device", "virtio-blk-pci,drive=disk"),
    )
    async with lab.boot(machine(*own, ram_kind="memfd"), WORKLOAD, binary=binary) as vm:
        for method in (*ENGINES, "live-mapped") if binary == "patched" else methods:
            found = await verify_method(vm, method, tmp_path)
            assert found.equal, f"{method}: {found.detail}"


# The requests of the protocol vhost-user that have an answer, and what a backend says that can be
# migrated: VIRTIO_F_VERSION_1, VHOST_F_LOG_ALL and its own features, of which the log is shared.
_ANSWERS = {1: 1 << 32 | 1 << 30 | 1 << 26, 11: 0, 15: 1 << 1, 17: 1}
_HEADER = struct.Struct("<III")


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve a network to QEMU on which nothing ever happens."""
    with contextlib.suppress(asyncio.IncompleteReadError):
        while True:
            request, _, size = _HEADER.unpack(await reader.readexactly(_HEADER.size))
            await reader.readexactly(size)
            if request in _ANSWERS:
                writer.write(_HEADER.pack(request, 1 | 1 << 2, 8))
                writer.write(_ANSWERS[request].to_bytes(8, "little"))
    writer.close()


@pytest.mark.parametrize("binary", ["patched", "unpatched"])
async def test_a_network_that_another_process_serves_is_refused(
    binary: Variant, folder: Path, tmp_path: Path
) -> None:
    """Field report F22."""
    if not await offers(binary, "vhost-user-blk-pci"):
        pytest.skip(f"the {binary} QEMU that was named has no vhost-user")
    network = (
        *("-chardev", f"socket,id=outside,path={folder / 'net'}"),
        *("-netdev", "vhost-user,id=served,chardev=outside"),
        *("-device", "virtio-net-pci,netdev=served,romfile="),
    )
    methods = LIVE if binary == "patched" else ("background",)
    said = "chardev 'outside'" if binary == "patched" else r"network served \(vhost-user\)"
    async with (
        await asyncio.start_unix_server(_answer, folder / "net"),
        lab.boot(machine(*network, ram_kind="memfd"), WORKLOAD, binary=binary) as vm,
    ):
        for method in methods:
            await assert_refused(vm, method, tmp_path / "a.snap", said)


@pytest.mark.parametrize("share", [True, False])
async def test_memory_between_guests_is_refused_unless_it_is_private(
    share: bool, tmp_path: Path
) -> None:
    memory = f"memory-backend-ram,id=peers,size=1M,share={'on' if share else 'off'}"
    device = "ivshmem-plain,id=inter,memdev=peers,master=on"
    extra = machine("-object", memory, "-device", device)
    async with lab.boot(extra, WORKLOAD) as vm:
        for method in LIVE:
            if share:
                said = "ivshmem device 'inter'"
                await assert_refused(vm, method, tmp_path / "a.snap", said)
            else:
                await vm.snapshot(tmp_path / "a.snap", method, progress=False)
    if not await offers("unpatched", "ivshmem-plain"):
        return
    async with lab.boot(extra, WORKLOAD, binary="unpatched") as vm:
        if share:
            said = r"device inter \(ivshmem-plain\)"
            await assert_refused(vm, "background", tmp_path / "b.snap", said)
        else:
            await vm.snapshot(tmp_path / "b.snap", "background", progress=False)


def ram_descriptor(vm: VM) -> Path:
    """Where the kernel shows QEMU's descriptor of guest RAM."""
    begins = ("/memfd:memory-backend-memfd", f"{ram_dir()}/")
    for entry in Path(f"/proc/{vm.pid}/fd").iterdir():
        if str(entry.readlink()).startswith(begins):
            return entry
    raise AssertionError("guest RAM is in no file")


async def test_guest_memory_that_is_open_elsewhere_is_refused_until_it_is_closed(
    tmp_path: Path,
) -> None:
    async with lab.boot(machine(ram_kind="file"), WORKLOAD) as vm:
        for method in LIVE:
            with ram_descriptor(vm).open("r+b"):
                said = "memory 'pc.ram' is open more than once"
                await assert_refused(vm, method, tmp_path / "a.snap", said)
            await vm.snapshot(tmp_path / "a.snap", method, progress=False)
            (tmp_path / "a.snap").unlink()


async def test_the_unpatched_qemus_memory_is_refused_while_another_process_has_it_mapped(
    tmp_path: Path,
) -> None:
    async with lab.boot(machine(ram_kind="memfd"), WORKLOAD, binary="unpatched") as vm:
        with ram_descriptor(vm).open("r+b") as file:
            with mmap.mmap(file.fileno(), 4096):
                said = f"what process {os.getpid()} writes"
                await assert_refused(vm, "background", tmp_path / "a.snap", said)
            # Who only reads does no harm, nor who has a copy of his own.
            with mmap.mmap(file.fileno(), 4096, access=mmap.ACCESS_COPY):
                await vm.snapshot(tmp_path / "a.snap", "background", progress=False)


async def test_memory_that_would_be_left_out_of_the_image_is_refused(tmp_path: Path) -> None:
    async with lab.boot(machine(ram_kind="memfd"), WORKLOAD) as vm:
        both = [
            {"capability": name, "state": True}
            for name in ("background-snapshot", "x-ignore-shared")
        ]
        with pytest.raises(lab.errors.QmpError, match="not compatible with x-ignore-shared"):
            await vm.execute("migrate-set-capabilities", {"capabilities": both})
        await is_left_alone(vm)


@pytest.mark.parametrize("method", LIVE)
async def test_a_snapshot_into_a_disk_image_is_refused_with_the_capabilities_of_a_live_one(
    method: str, folder: Path
) -> None:
    """Field report F4."""
    disk = folder / "disk.qcow2"
    tool = find_qemu("patched").path.with_name("qemu-img")
    if not tool.exists():
        pytest.skip("the QEMU that was named has no qemu-img beside it")
    making = await asyncio.create_subprocess_exec(
        tool, "create", "-q", "-f", "qcow2", disk, "64M", stdout=asyncio.subprocess.DEVNULL
    )
    assert await making.wait() == 0
    extra = (
        *("-blockdev", f"driver=qcow2,node-name=disk,file.driver=file,file.filename={disk}"),
        *("-device", "ide-hd,drive=disk"),
    )
    job = {"job-id": "job", "tag": "a", "vmstate": "disk", "devices": ["disk"]}

    async with lab.boot(machine(*extra), WORKLOAD) as vm:

        async def set_all(state: bool) -> None:
            states = [{"capability": name, "state": state} for name in METHODS[method].capabilities]
            await vm.execute("migrate-set-capabilities", {"capabilities": states})
            engine = {"x-snapshot-engine": METHODS[method].engine}
            await vm.execute("migrate-set-parameters", engine)

        await set_all(True)
        for command in ("savevm a", "loadvm a"):
            assert "capability background-snapshot is set" in await vm.hmp(command)
        for command in ("snapshot-save", "snapshot-load"):
            with pytest.raises(lab.errors.QmpError, match="capability background-snapshot is set"):
                await vm.execute(command, job)
        assert await vm.execute("query-jobs") == []
        await is_left_alone(vm)
        await set_all(False)
        assert await vm.hmp("savevm a") == ""
        assert await vm.hmp("loadvm a") == ""
        await works_on(vm)


# The merging of equal pages


@contextlib.contextmanager
def merging() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(ksm_running())
        except (HostError, TransientError) as error:
            pytest.skip(str(error))
        yield


@pytest.fixture
def mergeable(monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU offers guest memory for merging, as it does by itself."""
    monkeypatch.setattr("lab.vm.commandline.machine_option", lambda _: ",mem-merge=on")


@pytest.mark.usefixtures("mergeable")
async def test_memory_that_may_be_merged_is_refused_while_the_kernel_merges(tmp_path: Path) -> None:
    """Field report F2."""
    async with lab.boot(machine(), WORKLOAD) as vm:
        with merging():
            for method in LIVE:
                await assert_refused(vm, method, tmp_path / "a.snap", "KSM runs.*mem-merge=off")
        await vm.snapshot(tmp_path / "a.snap", "live", progress=False)


@pytest.mark.usefixtures("mergeable")
@pytest.mark.parametrize("method", ENGINES)
async def test_a_snapshot_fails_if_the_kernel_begins_to_merge_meanwhile(
    method: str, tmp_path: Path
) -> None:
    """Field report F2, as it was seen."""
    async with lab.boot(machine(), WORKLOAD) as vm:
        await begin(vm, method, tmp_path / "a.snap", hold=True)
        await until_status(vm, "pre-switchover")
        with merging():
            await vm.execute("migrate-continue", {"state": "pre-switchover"})
            reply = await ended(vm, "failed")
        assert "KSM" in reply["error-desc"]
        await is_left_alone(vm)


@pytest.mark.usefixtures("mergeable")
@pytest.mark.parametrize("method", ENGINES)
async def test_a_snapshot_fails_if_the_kernel_has_merged_for_a_moment(
    method: str, tmp_path: Path
) -> None:
    async with lab.boot(machine(), WORKLOAD) as vm:
        await begin(vm, method, tmp_path / "a.snap", hold=True)
        await until_status(vm, "pre-switchover")
        with merging():
            scans = KSM / "full_scans"
            before = scans.read_text()

            async def scanned() -> bool:
                return scans.read_text() != before

            await until(scanned)
        await vm.execute("migrate-continue", {"state": "pre-switchover"})
        reply = await ended(vm, "failed")
        assert "KSM has run" in reply["error-desc"]
        await is_left_alone(vm)


@pytest.mark.usefixtures("mergeable")
async def test_memory_that_may_be_merged_is_refused_where_it_can_not_be_seen_whether_it_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a jail or a container that hides these files of the kernel's."""
    if os.geteuid() != 0:
        pytest.skip("only root can hide files from QEMU")
    if not KSM.is_dir():
        pytest.skip("this kernel has no KSM")
    script = folder / "qemu"
    hidden = f"mount -t tmpfs tmpfs {KSM} && exec {find_qemu('patched').path}"
    script.write_text(f'#!/bin/sh\nexec unshare --mount sh -c \'{hidden} "$@"\' sh "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("LAB_QEMU_PATCHED", str(script))
    async with lab.boot(machine(), WORKLOAD) as vm:
        for method in LIVE:
            said = f"{KSM}/run cannot be read.*mem-merge=off"
            await assert_refused(vm, method, tmp_path / "a.snap", said)


async def test_memory_that_is_not_offered_for_merging_is_right_while_the_kernel_merges(
    tmp_path: Path,
) -> None:
    async with lab.boot(machine(), WORKLOAD) as vm:
        with merging():
            for method in ENGINES:
                found = await verify_method(vm, method, tmp_path)
                assert found.equal, f"{method}: {found.detail}"


async def test_memory_of_which_only_a_part_is_offered_for_merging_is_refused_too(
    tmp_path: Path,
) -> None:
    part = ("-object", "memory-backend-ram,id=part,size=1M,merge=on")
    async with lab.boot(machine(*part), WORKLOAD) as vm:
        with merging():
            await assert_refused(vm, "live", tmp_path / "a.snap", "KSM runs")
