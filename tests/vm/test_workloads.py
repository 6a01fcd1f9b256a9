"""Every kind of workload: it works, a live snapshot is exact, and the restored guest works on."""

import asyncio
import time
import typing
from pathlib import Path

import pytest

import lab
from lab.guests.protocol import REPLAYED_KINDS
from lab.scenario.workload import WorkloadKind
from lab.session import VM
from lab.verify.oracle import verify_method

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(300),
    pytest.mark.platforms("tcg", "kvm", "micro-tcg", "micro-kvm"),
]

MIN_OPS = 1000


async def works_on(vm: VM) -> None:
    """Assert that every writer completes operations, without an error of its own."""
    before = await vm.progress_page()
    # An idle guest counts once a millisecond, and only in its first thread.
    counting, ops = (1, 10) if before.kind == "idle" else (before.threads, MIN_OPS)
    async with asyncio.timeout(120):
        while True:
            now = await vm.progress_page()
            done = [n - b for n, b in zip(now.ops, before.ops, strict=True)]
            if min(done[:counting]) >= ops:
                break
            # A page of RAM has no event to wait for.
            await asyncio.sleep(0.01)
    assert now.page_errors == 0


async def verifies(vm: VM) -> None:
    """Assert that the guest finds every word of its working set as it should be."""
    assert await vm.verify_working_set() == 0
    page = await vm.progress_page()
    assert page.page_errors == 0


async def test_a_paced_guest_does_no_more_than_its_rate_and_a_snapshot_of_it_is_exact(
    tmp_path: Path,
) -> None:
    rate, late_s = 4000, 0.01
    machine = lab.Machine(ram_mib=192, vcpus=2)
    workload = lab.Workload(wss_mib=8, threads=2, rate_ops_per_s=rate)
    async with lab.boot(machine, workload) as vm:
        # The warm-up is not paced, and a writer may still be at the end of its last turn there.
        await works_on(vm)
        since_s = time.monotonic()
        done_at_first = (await vm.progress_page()).total_ops
        await works_on(vm)
        done = (await vm.progress_page()).total_ops - done_at_first
        passed_s = time.monotonic() - since_s
        # A writer that has been late makes up for it, and works in turns of 1 ms.
        assert MIN_OPS <= done <= rate * (passed_s + late_s + 2 * 0.001)
        found = await verify_method(vm, "live", tmp_path)
        assert found.equal, found.detail
        assert found.replay is not None
        await verifies(vm)


@pytest.mark.parametrize("kind", typing.get_args(WorkloadKind))
async def test_a_live_snapshot_of_every_kind_is_exact_and_works_on(
    kind: WorkloadKind, tmp_path: Path, platform: str
) -> None:
    if kind == "allocate" and platform.startswith("micro"):
        pytest.skip("a microguest has no kernel from which it could allocate memory")
    image = tmp_path / "a.snap"
    machine = lab.Machine(ram_mib=192, vcpus=2)
    workload = lab.Workload(kind, wss_mib=32, threads=2, time_writes=kind == "allocate")
    async with lab.boot(machine, workload) as vm:
        await works_on(vm)
        found = await verify_method(vm, "live", tmp_path)
        assert found.equal, found.detail
        assert found.operations > 0
        assert (found.replay is not None) == (kind in REPLAYED_KINDS)
        await vm.snapshot(image, "live", progress=False)
        await works_on(vm)
        await verifies(vm)
    async with lab.restore(image) as again:
        await verifies(again)
        await works_on(again)
