"""A guest that cannot start or is not permitted something says so in one line."""

import asyncio
import os
import resource
import shlex
from pathlib import Path

import psutil
import pytest

import lab
from lab.errors import GuestError, HostError, LaunchError, QmpError, SnapshotError
from lab.qemu.build import find_qemu
from lab.scenario.methods import MAPPED_RAM, METHODS, Variant
from lab.session import VM

pytestmark = [pytest.mark.vm, pytest.mark.thorough]

MACHINE = lab.Machine(ram_mib=256)
WORKLOAD = lab.Workload("random", wss_mib=48)


def wrap_qemu(
    folder: Path, monkeypatch: pytest.MonkeyPatch, script: str, variant: Variant = "unpatched"
) -> None:
    """Let a QEMU be started by a shell script that ends in running $QEMU "$@"."""
    real = find_qemu(variant).path
    wrapper = folder / "wrapper"
    wrapper.write_text(f"#!/bin/sh\nQEMU={shlex.quote(str(real))}\n{script}\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv(f"LAB_QEMU_{variant.upper()}", str(wrapper))


async def still_works(vm: VM) -> None:
    assert await vm.is_running()
    before = await vm.progress_page()
    async with asyncio.timeout(60):
        while (now := await vm.progress_page()).total_ops == before.total_ops:
            continue
    assert now.page_errors == 0


async def test_a_qemu_that_dies_at_the_start_is_told_with_its_own_words() -> None:
    machine = lab.Machine(ram_mib=256, extra_args=("-device", "no-such-device"))
    with pytest.raises(LaunchError, match="exited with status 1 while starting") as caught:
        async with lab.boot(machine, WORKLOAD, binary="unpatched"):
            pass
    assert "no-such-device" in caught.value.cause
    assert "no-such-device" in caught.value.log_tail
    assert caught.value.exit_code == 1
    assert "no-such-device" in caught.value.command


async def test_a_qemu_that_dies_while_it_runs_is_told_and_ends_every_wait(tmp_path: Path) -> None:
    async with lab.boot(MACHINE, WORKLOAD, binary="unpatched") as vm:
        psutil.Process(vm.pid).kill()
        with pytest.raises(LaunchError, match="was ended by SIGKILL"):
            await vm.snapshot(tmp_path / "a.snap", "stop-and-copy", progress=False)
        with pytest.raises(QmpError, match="went away"):
            await vm.qmp.execute("query-status")
    assert list(tmp_path.iterdir()) == []


async def test_a_guest_that_refuses_its_workload_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.vm.boot.check_fit", lambda machine, workload: None)
    with pytest.raises(GuestError, match="refused"):
        async with lab.boot(MACHINE, lab.Workload(wss_mib=4096), binary="unpatched"):
            pass


async def test_a_guest_that_is_silent_is_given_up() -> None:
    with pytest.raises(GuestError, match="silent"):
        async with lab.boot(MACHINE, WORKLOAD, binary="unpatched", timeout_s=0.01):
            pass


async def test_cancelling_a_boot_leaves_no_process() -> None:
    me = psutil.Process()
    before = {child.pid for child in me.children()}

    async def body() -> None:
        async with lab.boot(MACHINE, WORKLOAD, binary="unpatched"):
            await asyncio.sleep(600)

    task = asyncio.create_task(body())
    async with asyncio.timeout(60):
        while {child.pid for child in me.children()} <= before:
            await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert {child.pid for child in me.children()} <= before


async def test_too_little_memory_is_refused_before_qemu_starts() -> None:
    with pytest.raises(HostError, match="MiB are available"):
        async with lab.boot(lab.Machine(ram_mib=1024 * 1024), WORKLOAD, binary="unpatched"):
            pass


async def test_transparent_huge_pages_can_be_switched_off_for_a_guest() -> None:
    async with lab.boot(lab.Machine(ram_mib=256, thp=False), WORKLOAD, binary="unpatched") as vm:
        rollup = Path(f"/proc/{vm.pid}/smaps_rollup").read_text()
        huge = next(line for line in rollup.splitlines() if line.startswith("AnonHugePages"))
        assert huge.split()[1] == "0"


@pytest.mark.parametrize("method", METHODS)
async def test_a_disk_that_fills_up_fails_the_snapshot_and_nothing_else(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A limit on the size of files acts as a full disk does: write() fails in the middle.  The lab
    # could foresee that one.
    monkeypatch.setattr("lab.snapshot.take.check_disk", lambda *args: None)
    script = "trap '' XFSZ\nexec prlimit --fsize=20000000:unlimited -- $QEMU \"$@\""
    variant = METHODS[method].preferred_variant
    wrap_qemu(tmp_path, monkeypatch, script, variant)
    folder = tmp_path / "images"
    folder.mkdir()
    async with lab.boot(MACHINE, WORKLOAD, binary=variant) as vm:
        # QEMU keeps the reason of a write to the stream, and not of one to a place in the file.
        mapped = MAPPED_RAM in METHODS[method].capabilities
        reason = "Input/output error" if mapped else "[Ff]ile too large"
        with pytest.raises(SnapshotError, match=f"{method} failed: .*{reason}"):
            await vm.snapshot(folder / "a.snap", method, progress=False)
        assert list(folder.iterdir()) == []
        await still_works(vm)
        # The limit goes, as somebody would free space; the next snapshot is a good one.
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(vm.pid, resource.RLIMIT_FSIZE, unlimited)
        taken = await vm.snapshot(folder / "a.snap", method, progress=False)
        assert taken.image_bytes > 48 << 20
        await still_works(vm)
    async with lab.restore(folder / "a.snap") as again:
        await still_works(again)


async def test_without_permission_for_userfaultfd_a_live_snapshot_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("takes root to give up root's permissions")
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("this host permits userfaultfd to everybody")
    # Nobody, who may still read root's files: neither the system call nor the device is open to it.
    drop = "--reuid=65534 --regid=65534 --clear-groups"
    keep = "--inh-caps=-all,+dac_read_search --ambient-caps=+dac_read_search"
    wrap_qemu(tmp_path, monkeypatch, f'exec setpriv {drop} {keep} -- $QEMU "$@"')
    async with lab.boot(MACHINE, WORKLOAD, binary="unpatched") as vm:
        with pytest.raises(HostError, match="needs userfaultfd") as caught:
            await vm.snapshot(tmp_path / "a.snap", "background", progress=False)
        assert "unprivileged_userfaultfd" in caught.value.remedy
        await still_works(vm)
        assert [path.name for path in tmp_path.iterdir()] == ["wrapper"]
