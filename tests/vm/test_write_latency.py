"""How long the guest's operations take, as a real guest counts it."""

import asyncio
from pathlib import Path

import pytest

import lab
from lab.errors import UsageError
from lab.instruments.writelatency import STALL_NS

pytestmark = [pytest.mark.vm, pytest.mark.platforms("tcg", "kvm", "micro-kvm")]

MACHINE = lab.Machine(ram_mib=256, vcpus=2)
WORKLOAD = lab.Workload("random", wss_mib=64, threads=2, time_writes=True)


async def test_the_durations_of_all_operations_are_the_time_that_passed() -> None:
    async with lab.boot(MACHINE, WORKLOAD, binary="patched") as vm:
        latency = await vm.write_latency()
        ops = [(await vm.progress_page()).total_ops]
        latency.read()
        await asyncio.sleep(2)
        latency.read()
        ops.append((await vm.progress_page()).total_ops)
    table = latency.df(["run"])
    counted = int(table["ops"].sum())
    # The counters are read before the first and after the second reading.
    assert 0.5 * (ops[1] - ops[0]) < counted <= ops[1] - ops[0]
    elapsed_ns = latency.readings[1].t_ns - latency.readings[0].t_ns
    middle_ns = (table["low_ns"] + table["high_ns"]) / 2
    busy_ns = float((middle_ns * table["ops"]).sum())
    # Two writers, which do little else than operate; 1/64 of the bucket's width at most is wrong.
    assert 0.2 * elapsed_ns < busy_ns < 2 * 1.05 * elapsed_ns


async def test_a_snapshot_shows_as_stalls_of_the_guest(tmp_path: Path) -> None:
    async with lab.boot(MACHINE, WORKLOAD, binary="patched") as vm:
        snapshot = await vm.snapshot(tmp_path / "image", "live-inline", before_s=0.2, after_s=0)
    table = snapshot.df_write_latency()
    assert table["window"].drop_duplicates().tolist() == ["before", "during"]
    summary = snapshot.summary()
    faults = snapshot.df_faults()
    # Each fault of a writer held one operation up, but several may have met in one operation
    # and others were device emulation's.
    assert 0.3 * len(faults) < summary["stalls"]
    assert summary["stall_max_us"] * 1e3 > STALL_NS
    assert summary["stall_p50_us"] <= summary["stall_p999_us"] <= summary["stall_max_us"]


async def test_a_guest_that_times_nothing_says_so() -> None:
    async with lab.boot(lab.Machine(ram_mib=256), lab.Workload(wss_mib=16)) as vm:
        with pytest.raises(UsageError, match="time_writes"):
            await vm.write_latency()
