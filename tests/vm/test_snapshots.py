"""Every method gives an image of one instant, and leaves the guest running."""

import asyncio
import itertools
import shutil
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

import lab
from lab.errors import RestoreError, SnapshotError, UsageError
from lab.host.room import reserve_bytes
from lab.scenario.machine import Accel
from lab.scenario.methods import METHODS, Variant
from lab.session import VM
from lab.snapshot.image import MARK_BYTES, read_sidecar
from lab.snapshot.sidecar import sidecar_path
from lab.verify.oracle import verify_method

pytestmark = [pytest.mark.vm, pytest.mark.platforms("tcg", "kvm", "micro-kvm")]

ORDINARY = ("migrate-to-file", "stop-and-copy")
LIVE = ("live", "live-rfc", "live-inline")


def small(vcpus: int = 1) -> tuple[lab.Machine, lab.Workload]:
    machine = lab.Machine(ram_mib=256, vcpus=vcpus)
    return machine, lab.Workload("random", wss_mib=48, threads=vcpus)


async def until(reached: Callable[[], bool]) -> None:
    """Wait for what has no event to wait for."""
    async with asyncio.timeout(60):
        while not reached():
            await asyncio.sleep(0)


async def works_on(vm: VM) -> None:
    """Assert that the guest completes operations, without an error of its own."""
    before = await vm.progress_page()
    async with asyncio.timeout(60):
        while (now := await vm.progress_page()).total_ops == before.total_ops:
            continue
    assert now.page_errors == 0
    assert now.nonce == vm.ready.nonce


@pytest.fixture(params=["patched", "unpatched"])
async def vm(request: pytest.FixtureRequest) -> AsyncIterator[VM]:
    async with lab.boot(*small(), binary=request.param) as booted:
        yield booted


NODES_MIB = 64


def two_nodes(accel: Accel) -> tuple[lab.Machine, lab.Workload]:
    """A machine whose RAM is in two blocks, with a guest that writes to both."""
    nodes = [f"n{number}" for number in range(2)]
    arguments = [
        *(("-object", f"memory-backend-ram,id={node},size={NODES_MIB}M") for node in nodes),
        *(("-numa", f"node,memdev={node}") for node in nodes),
    ]
    machine = lab.Machine(
        guest="micro",
        accel=accel,
        ram_mib=len(nodes) * NODES_MIB,
        vcpus=2,
        extra_args=tuple(itertools.chain(*arguments)),
    )
    return machine, lab.Workload("random", wss_mib=NODES_MIB, threads=2)


@pytest.mark.platforms("micro-tcg", "micro-kvm")
@pytest.mark.parametrize("method", ["live", "migrate-to-file"])
async def test_no_block_of_memory_is_left_behind(
    method: str, platform: str, tmp_path: Path
) -> None:
    """Upstream's migration under TCG loses what is written to any block but the first."""
    for _ in range(3):
        async with lab.boot(*two_nodes("tcg" if "tcg" in platform else "kvm")) as vm:
            found = await verify_method(vm, method, tmp_path)
            assert found.equal, found.detail


@pytest.mark.platforms("micro-tcg")
async def test_an_unpatched_qemu_that_would_lose_memory_is_not_asked_to(tmp_path: Path) -> None:
    image = tmp_path / "a.snap"
    async with lab.boot(*two_nodes("tcg"), binary="unpatched") as vm:
        with pytest.raises(SnapshotError, match=r"would lose .* n1 .*; use the patched QEMU"):
            await vm.snapshot(image, "migrate-to-file", progress=False)
        assert not image.exists()
        found = await verify_method(vm, "stop-and-copy", tmp_path)
        assert found.equal, found.detail


@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("variant", ["patched", "unpatched"])
async def test_restored_memory_is_that_of_the_pause_instant(
    variant: Variant, vcpus: int, tmp_path: Path
) -> None:
    async with lab.boot(*small(vcpus), binary=variant) as vm:
        for method in [name for name, how in METHODS.items() if how.runs_on(variant)]:
            found = await verify_method(vm, method, tmp_path)
            assert found.equal, f"{method}: {found.detail}"
            assert found.pages_differing == 0
            assert found.pages_compared >= 256 * 256
            assert found.replay is not None
            assert found.operations > 0
            await works_on(vm)
    assert list(tmp_path.iterdir()) == []


async def test_an_image_where_each_page_has_its_place_is_restored_by_many_threads(
    tmp_path: Path,
) -> None:
    async with lab.boot(*small(vcpus=2)) as vm:
        found = await verify_method(vm, "live-mapped", tmp_path, channels=4)
        assert found.equal, found.detail
        image = tmp_path / "a.snap"
        await vm.snapshot(image, "live", progress=False)
        with pytest.raises(UsageError, match="4 channels cannot read"):
            async with lab.restore(image, channels=4):
                pass
        await vm.snapshot(image, "live-mapped", progress=False)
    async with lab.restore(image, channels=4) as again:
        await works_on(again)
        # What the restore switched on is no obstacle to the next snapshot.
        await again.snapshot(image, "live", progress=False)


@pytest.mark.usefixtures("damage_images")
async def test_the_oracle_finds_one_changed_byte(tmp_path: Path) -> None:
    async with lab.boot(*small(), binary="unpatched") as vm:
        found = await verify_method(vm, "stop-and-copy", tmp_path)
    assert not found.equal
    assert found.pages_differing == 1
    assert "1 of 65536 pages of pc.ram differ" in found.detail


async def test_methods_follow_each_other_in_one_guest(vm: VM, tmp_path: Path) -> None:
    """Nothing a method sets up may be left for the next, in whatever order."""
    possible = [name for name, how in METHODS.items() if how.runs_on(vm.binary.variant)]
    for method in (*possible, *reversed(possible)):
        image = tmp_path / "a.snap"
        taken = await vm.snapshot(image, method, progress=False)
        assert taken.outcome == "ok"
        assert taken.request_ns < taken.end_ns
        assert taken.stop_ns is not None
        assert taken.resume_ns is not None
        assert taken.request_ns <= taken.stop_ns < taken.resume_ns
        assert taken.image_bytes == image.stat().st_size > 48 << 20
        assert await vm.is_running()
        await works_on(vm)
        enabled = {
            state["capability"]
            for state in await vm.execute("query-migrate-capabilities")
            if state["state"]
        }
        assert not enabled & {"background-snapshot", "pause-before-switchover"}


async def test_images_are_private_and_described_and_replace_older_ones(
    vm: VM, tmp_path: Path
) -> None:
    image = tmp_path / "a.snap"
    for seen in (1, 2):
        taken = await vm.snapshot(image, "stop-and-copy", progress=False)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.snap", "a.snap.json"], seen
        for path in (image, sidecar_path(image)):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        sidecar = read_sidecar(image)
        assert sidecar.machine == vm.machine
        assert sidecar.ready == vm.ready
        assert sidecar.image_bytes == taken.image_bytes


@pytest.mark.parametrize("method", [*ORDINARY, *LIVE, "background"])
async def test_a_restored_guest_is_the_same_boot_and_works_on(method: str, tmp_path: Path) -> None:
    image = tmp_path / "a.snap"
    variant = METHODS[method].preferred_variant
    async with lab.boot(*small(), binary=variant) as vm:
        await vm.snapshot(image, method, progress=False)
        end = await vm.progress_page()
    async with lab.restore(image, paused=True) as again:
        assert not await again.is_running()
        start = await again.progress_page()
        assert start.nonce == end.nonce
        assert 0 < start.total_ops <= end.total_ops
        await again.cont()
        await works_on(again)
        # A restored guest is a guest: it can be snapshotted again.
        await again.snapshot(tmp_path / "b.snap", method, progress=False)
    async with lab.restore(tmp_path / "b.snap") as third:
        assert await third.is_running()
        await works_on(third)


async def test_a_guest_that_was_stopped_stays_stopped(vm: VM, tmp_path: Path) -> None:
    for method in [name for name, how in METHODS.items() if how.runs_on(vm.binary.variant)]:
        await vm.stop()
        taken = await vm.snapshot(tmp_path / "a.snap", method, progress=False)
        assert not await vm.is_running()
        assert taken.resume_ns is None
        assert taken.pause_ms is None
        if method in ORDINARY:
            with pytest.raises(SnapshotError, match=r"vm\.cont\(\)"):
                await vm.snapshot(tmp_path / "a.snap", method, progress=False)
        await vm.cont()
        await works_on(vm)


@pytest.mark.parametrize("method", LIVE)
async def test_live_methods_account_for_the_pause_and_every_fault(
    method: str, tmp_path: Path
) -> None:
    async with lab.boot(*small()) as vm:
        taken = await vm.snapshot(tmp_path / "a.snap", method, progress=False)
        faults, phases = taken.df_faults(), taken.df_phases()
        assert {"stop", "device-state", "arm", "resume", "sweep"} <= set(phases["phase"])
        assert (phases["duration_ns"] >= 0).all()
        assert (phases["start_ns"] >= taken.request_ns).all()
        assert len(faults) == taken.counters["faults"] > 0
        assert taken.fault_log is not None
        assert taken.fault_log.dropped == 0
        # A page faults once: no other thread writes to the same RAM of this machine.  One that is
        # written to before the VM is paused is given free again, and may be written to once more.
        while_paused = faults[faults["resolver"] != "not-paused"]
        assert not while_paused.duplicated(["block", "offset"]).any()
        assert set(faults["vcpu"].dropna()) == {0}
        assert (faults["latency_ns"].dropna() > 0).all()
        assert taken.summary()["faults"] == len(faults)


async def test_progress_is_sampled_around_the_snapshot(vm: VM, tmp_path: Path) -> None:
    taken = await vm.snapshot(tmp_path / "a.snap", "stop-and-copy", before_s=0.2, after_s=0.2)
    df = taken.df_progress()
    assert taken.stop_ns is not None
    assert taken.resume_ns is not None
    assert df["t_ns"].min() < taken.request_ns
    assert df["t_ns"].max() > taken.resume_ns
    # A stopped guest does nothing: the count stands still between the two events.  The margin is
    # for the events' clock, which is another one and in microseconds.
    margin_ns = 20_000
    stopped = df[
        (df["t_ns"] > taken.stop_ns + margin_ns) & (df["t_ns"] < taken.resume_ns - margin_ns)
    ]
    assert len(stopped) > 3
    assert stopped["ops"].nunique() == 1


async def test_the_sampled_count_is_the_guests_own(vm: VM) -> None:
    async with vm.sampling() as sampler:
        await until(lambda: sampler.samples >= 20)
        await vm.stop()
        since = sampler.samples
        await until(lambda: sampler.samples >= since + 3)
    page = await vm.progress_page()
    assert int(sampler.df()["ops"].iloc[-1]) == page.total_ops
    assert sampler.df()["ops"].is_monotonic_increasing


# Bad input and faults


async def test_a_second_snapshot_while_one_runs_is_refused_and_disturbs_nothing(
    vm: VM, tmp_path: Path
) -> None:
    method = "live-rfc" if vm.binary.variant == "patched" else "background"
    running = asyncio.create_task(vm.snapshot(tmp_path / "a.snap", method, progress=False))
    await until(lambda: any(event.name == "MIGRATION" for event in vm.qmp.events))
    assert not running.done()
    with pytest.raises(SnapshotError, match=f"a {method} snapshot is still running"):
        await vm.snapshot(tmp_path / "b.snap", "stop-and-copy")
    assert (await running).outcome == "ok"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.snap", "a.snap.json"]


# The patched QEMU's are cancelled in each of their phases, in test_interrupted.py.
@pytest.mark.parametrize("method", [*ORDINARY, "background"])
async def test_a_cancelled_snapshot_leaves_the_guest_running_and_no_file(
    method: str, tmp_path: Path
) -> None:
    variant = METHODS[method].preferred_variant
    async with lab.boot(*small(), binary=variant) as vm:
        running = asyncio.create_task(vm.snapshot(tmp_path / "a.snap", method, progress=False))
        await until(lambda: "active" in [e.data.get("status") for e in vm.qmp.events])
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert list(tmp_path.iterdir()) == []
        assert await vm.is_running()
        await works_on(vm)
        found = await verify_method(vm, method, tmp_path)
        assert found.equal, found.detail


async def test_a_method_of_the_other_qemu_is_refused(vm: VM, tmp_path: Path) -> None:
    method = "background" if vm.binary.variant == "patched" else "live-rfc"
    with pytest.raises(UsageError, match=f"{method} needs the .* QEMU"):
        await vm.snapshot(tmp_path / "a.snap", method)
    with pytest.raises(UsageError, match="unknown method"):
        await vm.snapshot(tmp_path / "a.snap", "magic")
    assert list(tmp_path.iterdir()) == []


async def test_no_room_on_the_disk_is_refused_before_anything_happens(
    vm: VM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    usage = usage._replace(free=reserve_bytes(usage.total) + (1 << 20))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    events = len(vm.qmp.events)
    with pytest.raises(SnapshotError, match=r" 1 MiB are free"):
        await vm.snapshot(tmp_path / "a.snap", "stop-and-copy")
    assert len(vm.qmp.events) == events
    assert list(tmp_path.iterdir()) == []


async def test_a_migration_that_does_not_converge_is_given_up_and_the_guest_runs_on(
    vm: VM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lab.snapshot.attempt.MAX_PRECOPY_RAM_SIZES", 0)
    monkeypatch.setattr("lab.snapshot.attempt.SIZE_POLL_S", 0)
    with pytest.raises(SnapshotError, match="does not converge"):
        await vm.snapshot(tmp_path / "a.snap", "migrate-to-file", progress=False)
    assert list(tmp_path.iterdir()) == []
    await works_on(vm)


async def test_a_directory_that_is_not_there_is_refused(vm: VM, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="cannot be created"):
        await vm.snapshot(tmp_path / "missing" / "a.snap", "stop-and-copy")
    assert await vm.is_running()


async def test_damaged_images_are_refused_in_one_line_and_do_not_hang(tmp_path: Path) -> None:
    image = tmp_path / "a.snap"
    async with lab.boot(*small(), binary="unpatched") as vm:
        # What QEMU finds by itself; checksums would find the rest.
        await vm.snapshot(image, "stop-and-copy", progress=False, checksums=False)
    # The mark, by which image and sidecar belong together, stays: QEMU has to find the damage.
    content, sidecar = image.read_bytes(), sidecar_path(image).read_text()
    whole, mark = content[:-MARK_BYTES], content[-MARK_BYTES:]
    size = len(content)
    cut = whole[: len(whole) // 2]
    damages = {
        "cut": (
            cut,
            sidecar.replace(f'"image_bytes": {size}', f'"image_bytes": {len(cut) + MARK_BYTES}'),
        ),
        "garbage": (b"\xa5" * len(whole), sidecar),
        "hole": (whole[: 1 << 20] + bytes(1 << 20) + whole[2 << 20 :], sidecar),
        "machine type": (whole, sidecar.replace("pc-i440fx", "pc-q35")),
        "unknown machine type": (whole, sidecar.replace("pc-i440fx-", "pc-nonsense-")),
        "other RAM": (whole, sidecar.replace('"ram_mib": 256', '"ram_mib": 320')),
        "other boot": (whole, sidecar.replace('"nonce": "', '"nonce": "1')),
    }
    for damage, (content, description) in damages.items():
        image.write_bytes(content + mark)
        sidecar_path(image).write_text(description)
        with pytest.raises(RestoreError) as caught:
            async with lab.restore(image):
                pass
        assert "\n" not in str(caught.value), damage
        assert caught.value.remedy, damage
