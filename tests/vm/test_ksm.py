"""The kernel merges equal pages of other processes, and the guest's memory keeps its protection."""

import asyncio
import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

import lab
from lab.errors import HostError, TransientError
from lab.guests.protocol import PAGE_BYTES
from lab.host.ksm import KSM, PR_SET_MEMORY_MERGE, ksm_running
from lab.host.memory import write_process
from lab.scenario.machine import RamKind
from lab.session import VM
from lab.verify.oracle import verify_method
from tests.support.bench import until, until_phase

pytestmark = [pytest.mark.vm, pytest.mark.platforms("micro-kvm", "micro-tcg")]

METHODS_HERE = ("live", "live-inline")
RAM_MIB = 64
#: Equal pages, at the end of RAM, where nothing is saved before the rest is, and no guest writes.
EQUAL_BYTES = 24 << 20
BUFFER_BYTES = 4 << 20
#: Slow enough for the kernel to go through all memory several times meanwhile.
RATE_MIB_PER_S = 8
#: A page has to be unchanged from one pass to the next before it is merged.
PASSES = 3
DECOY_BYTES = 1 << 20


def counter(name: str) -> int:
    return int((KSM / name).read_text())


@contextlib.contextmanager
def merged() -> Iterator[None]:
    """Have the kernel merge, or skip the test."""
    try:
        with ksm_running():
            yield
    except (HostError, TransientError) as error:
        pytest.skip(str(error))


@contextlib.contextmanager
def decoy() -> Iterator[None]:
    """Equal pages of this process, so that there is something to merge in any case."""
    with mmap.mmap(-1, DECOY_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_MERGEABLE)
        memory[:] = b"\5" * DECOY_BYTES
        yield


async def passed() -> None:
    """Wait until the kernel has looked at every page that it may merge."""
    first = counter("full_scans")

    async def reached() -> bool:
        return counter("full_scans") > first + PASSES and counter("pages_sharing") > 0

    await until(reached)


@pytest.mark.parametrize("method", METHODS_HERE)
async def test_pages_that_would_be_merged_are_those_of_the_pause_instant(
    method: str, tmp_path: Path
) -> None:
    """Field report F2."""
    machine = lab.Machine(ram_mib=RAM_MIB, guest="micro", thp=False)
    async with lab.boot(machine, lab.Workload("random", wss_mib=8)) as vm:
        await vm.execute("migrate-set-parameters", {"x-snapshot-buffer-size": BUFFER_BYTES})
        (block,) = [block for block in await vm.ram_blocks() if block.name == "pc.ram"]
        begin = block.host_address + block.used_bytes - EQUAL_BYTES
        ends = range(begin + EQUAL_BYTES - PAGE_BYTES, begin, -PAGE_BYTES)
        await asyncio.to_thread(write_process, vm.pid, begin, b"\3" * EQUAL_BYTES)
        task = asyncio.create_task(
            verify_method(vm, method, tmp_path, storage_mib_per_s=RATE_MIB_PER_S)
        )
        # Of the guest's first snapshot: QEMU lists the phases of one before until the next begins,
        # and a write while the oracle copies the memory would be in one of the two only.
        await until_phase(vm, "sweep")
        with merged(), decoy():
            await passed()
            assert not task.done(), "the snapshot was over before the kernel had merged"
            # As a device or a vCPU of the guest would, whose first write to the page it is.
            for address in ends[:512]:
                await asyncio.to_thread(write_process, vm.pid, address, b"\4" * 8)
        found = await task
        assert found.equal, found.detail


def is_mergeable(vm: VM) -> bool:
    lines = Path(f"/proc/{vm.pid}/smaps").read_text().splitlines()
    return any("mg" in line.split() for line in lines if line.startswith("VmFlags:"))


@pytest.mark.platforms("micro-tcg")
@pytest.mark.parametrize("kind", [kind for kind in get_args(RamKind) if kind != "hugetlb"])
async def test_no_memory_of_qemu_is_offered_for_merging(
    kind: RamKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field report F2.  Not even where all memory of who starts QEMU is, as by MemoryKSM=."""
    monkeypatch.delenv("LAB_RAM_DIR", raising=False)
    prctl = ctypes.CDLL(None).prctl
    machine = lab.Machine(ram_mib=RAM_MIB, guest="micro", ram_kind=kind)
    # Where the kernel does not know the call, or forbids it, there is nothing to hand down.
    prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0)
    try:
        async with lab.boot(machine, lab.Workload("random", wss_mib=8)) as vm:
            assert not is_mergeable(vm)
    finally:
        prctl(PR_SET_MEMORY_MERGE, 0, 0, 0, 0)
