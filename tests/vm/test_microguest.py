"""The microguest: it boots into exactly what it was told, says so, and finds what is wrong."""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pandas as pd
import pytest

import lab
from lab.errors import GuestError, RestoreError
from lab.guests import protocol
from lab.guests.micro import build as micro
from lab.guests.protocol import PAGE_BYTES, LatencyPage, ProgressPage
from lab.host.memory import write_process
from lab.instruments.slowwrites import forgotten
from lab.scenario.machine import Accel
from lab.session import VM
from lab.verify.oracle import verify_method
from lab.vm.accelerator import kvm_guest_problem, settled

pytestmark = [pytest.mark.vm, pytest.mark.platforms("micro-tcg", "micro-kvm")]

MACHINE = lab.Machine(ram_mib=64, guest="micro", vcpus=2)
WORKLOAD = lab.Workload("random", wss_mib=16, threads=2, time_writes=True)


async def until(reached: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await reached():
            await asyncio.sleep(0.002)


async def set_address(vm: VM) -> int:
    """Where the first page of the working set is in QEMU's memory."""
    gpa = (await vm.progress_page()).latency_gpa
    page = LatencyPage.decode(vm.read_host(await vm.host_address(gpa), PAGE_BYTES), 1)
    return await vm.host_address(page.set_gpa)


@pytest.mark.parametrize("vcpus", [1, 2, 4])
@pytest.mark.parametrize("page_kib", [4, 2048])
async def test_it_does_what_it_was_told_with_pages_of_either_size(
    vcpus: int, page_kib: int, tmp_path: Path
) -> None:
    # Not a multiple of a page of 2 MiB, nor of the number of writers.
    workload = lab.Workload("random", wss_mib=13, threads=vcpus, seed=7, page_kib=page_kib)
    async with lab.boot(lab.Machine(ram_mib=64, guest="micro", vcpus=vcpus), workload) as vm:
        assert vm.ready.kind == "random"
        assert vm.ready.seed == 7
        assert vm.ready.threads == vcpus
        assert vm.ready.wss_pages == 13 * 256
        found = await verify_method(vm, "live", tmp_path)
        assert found.equal, found.detail
        assert found.replay is not None
        assert await vm.verify_working_set() == 0


async def test_its_verifier_finds_a_word_that_no_writer_looks_at() -> None:
    async with lab.boot(MACHINE, WORKLOAD) as vm:
        assert await vm.verify_working_set() == 0
        address = await set_address(vm) + 5 * PAGE_BYTES + 100 * 8
        before = vm.read_host(address, 8)
        write_process(vm.pid, address, bytes([before[0] ^ 1]) + before[1:])
        assert await vm.verify_working_set() == 1
        write_process(vm.pid, address, before)
        assert await vm.verify_working_set() == 0
        assert (await vm.progress_page()).page_errors == 0


@pytest.mark.parametrize("word", [0, 1, 2, 256, 511])
async def test_its_writer_finds_a_torn_page_and_counts_it_once(word: int) -> None:
    workload = lab.Workload("sequential", wss_mib=4, time_writes=True)
    async with lab.boot(lab.Machine(ram_mib=32, guest="micro"), workload) as vm:
        address = await set_address(vm)
        await vm.stop()
        # Where the writer has been and does not stand now.
        done = (await vm.progress_page()).total_ops
        page = (done + 512) % vm.ready.wss_pages
        before = vm.read_host(address + page * PAGE_BYTES + word * 8, 8)
        torn = struct.pack("<Q", struct.unpack("<Q", before)[0] ^ 1)
        write_process(vm.pid, address + page * PAGE_BYTES + word * 8, torn)
        await vm.cont()

        async def rounds() -> bool:
            return (await vm.progress_page()).total_ops > done + 3 * vm.ready.wss_pages

        await until(rounds)
        assert (await vm.progress_page()).page_errors == 1
        assert await vm.verify_working_set() == 0


async def test_a_reset_boots_it_again_into_the_same_work() -> None:
    async with lab.boot(MACHINE, WORKLOAD) as vm:
        first = vm.ready
        await vm.reset()
        await vm.wait_ready()
        assert vm.ready.nonce != first.nonce
        assert vm.ready.wss_pages == first.wss_pages
        assert await vm.verify_working_set() == 0


@pytest.mark.parametrize(
    ("word", "value", "problem"),
    [(1, 7, "does not know such parameters"), (6, 16, "does not fit into its RAM")],
)
async def test_what_it_can_not_do_it_refuses_by_name(
    word: int, value: int, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = micro.parameters

    def wrong(*args: object) -> bytes:
        words = bytearray(parameters(*args))  # type: ignore[arg-type]  # passed on as they come
        struct.pack_into("<Q", words, 8 * word, value)
        return bytes(words)

    monkeypatch.setattr(micro, "parameters", wrong)
    with pytest.raises(GuestError, match=problem):
        async with lab.boot(MACHINE, WORKLOAD):
            pass


async def test_a_kind_is_not_refused_for_coming_after_one_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = micro.parameters

    def later(*args: object) -> bytes:
        words = bytearray(parameters(*args))  # type: ignore[arg-type]  # passed on as they come
        struct.pack_into("<Q", words, 8, len(protocol.KINDS) - 1)
        return bytes(words)

    monkeypatch.setattr(protocol, "KINDS", (*protocol.KINDS, "later"))
    monkeypatch.setattr(micro, "parameters", later)
    rom = tmp_path / "rom"
    await micro.compile_rom(rom)
    monkeypatch.setattr(micro, "rom_path", lambda: rom)
    async with lab.boot(MACHINE, WORKLOAD) as vm:
        assert vm.ready.kind == "later"


# Exactly known pages at known times


PACE_OPS_PER_S = 4000
"""Of each of two writers."""


@pytest.mark.parametrize(
    "method",
    [
        "live",
        pytest.param("live-rfc", marks=pytest.mark.thorough),
        pytest.param("live-inline", marks=pytest.mark.thorough),
    ],
)
async def test_faults_are_those_of_the_pages_that_it_wrote_and_in_that_order(
    method: str, tmp_path: Path
) -> None:
    machine = lab.Machine(ram_mib=512, guest="micro", vcpus=2)
    # Each writer has more pages than it writes in the time, so that each is written once.
    workload = lab.Workload(
        "sequential", wss_mib=384, threads=2, time_writes=True, rate_ops_per_s=2 * PACE_OPS_PER_S
    )
    async with lab.boot(machine, workload) as vm:
        before = await vm.progress_page()
        async with all_slow_writes(vm) as readings:
            snapshot = await vm.snapshot(tmp_path / "a.snap", method, progress=False)
            await vm.stop()
        after = await vm.progress_page()
    slow = pd.concat(readings).drop_duplicates(["thread", "op"]).sort_values("start_ns")
    # The second writer is far ahead of where the sweep begins, so that it meets protected pages.
    pages = vm.ready.wss_pages // 2
    slow = slow[slow["thread"] == 1].set_index("op")
    first = int(slow["offset"].iloc[-1] - (slow.index[-1] - 1) % pages * PAGE_BYTES)
    faults = snapshot.df_faults().sort_values("read_ns").astype({"offset": int})
    faults = faults[(faults["offset"] >= first) & (faults["offset"] < first + pages * PAGE_BYTES)]
    assert len(faults) > 0
    assert set(faults["vcpu"]) == {1}
    # Which operation it was: one of those since, of which each has another page.
    index = (faults["offset"] - first) // PAGE_BYTES
    op = before.ops[1] + (index - before.ops[1]) % pages + 1
    assert op.is_monotonic_increasing
    assert op.max() <= after.ops[1]
    # The guest noted every one of them as slow, on its page, and none earlier than it was due.
    noted = slow.loc[op]
    assert (noted["offset"].to_numpy() == faults["offset"].to_numpy()).all()
    assert never_early(noted)


@contextlib.asynccontextmanager
async def all_slow_writes(vm: VM) -> AsyncIterator[list[pd.DataFrame]]:
    """Read what the guest remembers again and again, as that is only the latest: under KVM every
    eighth operation may be slow, because of its page table.
    """
    readings = [await vm.slow_writes()]

    async def read() -> None:
        now = await vm.slow_writes()
        assert forgotten(readings[-1], now) == []
        readings.append(now)

    async def read_on() -> None:
        while True:
            await asyncio.sleep(0.1)
            await read()

    task = asyncio.create_task(read_on())
    try:
        yield readings
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await read()


def never_early(noted: pd.DataFrame) -> bool:
    """Whether operations follow each other no faster than they are paced.

    A writer makes up for 10 ms, works in turns of 1 ms, and its clock is right to a permille.
    """
    passed_s = (noted["start_ns"] - noted["start_ns"].iloc[0]) / 1e9
    due_s = (noted.index - noted.index[0]) / PACE_OPS_PER_S
    return bool((passed_s >= due_s * 0.999 - 0.010 - 2 * 0.001).all())


async def test_it_remembers_the_latest_slow_operations(tmp_path: Path) -> None:
    workload = lab.Workload("random", wss_mib=48, threads=2, time_writes=True)
    async with lab.boot(lab.Machine(ram_mib=128, guest="micro", vcpus=2), workload) as vm:
        for _ in range(2):
            await vm.snapshot(tmp_path / "a.snap", "live-inline", progress=False)
        await vm.stop()
        slow = await vm.slow_writes()
        counts = await vm.write_latency()
        counts.read()
        page = await vm.progress_page()
    assert list(slow.columns) == ["thread", "op", "offset", "start_ns", "latency_ns"]
    assert set(slow["thread"]) == {0, 1}
    for thread, of_thread in slow.groupby("thread"):
        assert of_thread["op"].is_monotonic_increasing
        assert of_thread["op"].max() <= page.ops[int(str(thread))]
    assert (slow["latency_ns"] >= 3_990).all()


# Where it can be restored


async def restored_under(accel: Accel, image: Path) -> ProgressPage:
    async with lab.restore(image, accel=accel) as vm:
        since = await vm.progress_page()

        async def works() -> bool:
            return (await vm.progress_page()).total_ops > since.total_ops + 1000

        await until(works)
        assert await vm.verify_working_set() == 0
        return await vm.progress_page()


async def test_an_image_goes_from_tcg_to_kvm_and_not_back(
    platform: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if problem := await kvm_guest_problem("micro"):
        pytest.skip(f"KVM is not here: {problem}")
    image = tmp_path / "a.snap"
    async with lab.boot(MACHINE, WORKLOAD) as vm:
        await vm.snapshot(image, "live", progress=False)
        nonce = vm.ready.nonce
    for room in ("lab.vm.boot", "lab.snapshot.restore"):
        monkeypatch.setattr(f"{room}.settled", settled)
    assert (await restored_under("kvm", image)).nonce == nonce
    if platform == "micro-tcg":
        assert (await restored_under("tcg", image)).nonce == nonce
    else:
        with pytest.raises(RestoreError, match="was taken under KVM") as caught:
            await restored_under("tcg", image)
        assert 'accel="kvm"' in caught.value.remedy


@pytest.mark.parametrize("method", ["live", "stop-and-copy"])
async def test_one_that_was_stopped_and_reset_boots_anew_from_its_image(
    method: str, tmp_path: Path
) -> None:
    """What is left in its memory of the boot before is not taken for the new one."""
    async with lab.boot(MACHINE, WORKLOAD) as vm:
        before = vm.ready.nonce
        await vm.stop()
        await vm.reset()
        await vm.snapshot(tmp_path / "a.snap", method, progress=False)
    async with lab.restore(tmp_path / "a.snap") as again:
        await again.wait_ready()
        assert again.ready.nonce != before
        assert (await again.progress_page()).nonce == again.ready.nonce
