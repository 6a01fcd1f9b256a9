"""Instruments on a real guest: what they find can be true, and each can be left out."""

import dataclasses
from pathlib import Path
from typing import Any

import psutil
import pytest

import lab
from lab.errors import HostError
from lab.instruments.hugepages import rebuild_huge_pages, require_rebuild
from lab.measure.sample import take_sample
from lab.runs.columns import COLUMNS
from lab.scenario.document import to_json
from lab.scenario.instruments import Instruments
from lab.scenario.scenario import Scenario

pytestmark = [
    pytest.mark.vm,
    pytest.mark.thorough,
    pytest.mark.platforms("tcg", "kvm", "micro-kvm"),
]

MACHINE = lab.Machine(ram_mib=256, vcpus=2)
WORKLOAD = lab.Workload("random", wss_mib=64, threads=2)

# The kernel counts at least once a tick, of which there are 100 a second or more.
TICK_NS = 10_000_000


@pytest.fixture
def permission_to_rebuild() -> None:
    """Of who has it not, test_ordinary_user.py shows that it is told so."""
    try:
        require_rebuild()
    except HostError as error:
        pytest.skip(str(error))


async def test_the_times_of_threads_add_up_to_no_more_than_the_cpus_have(tmp_path: Path) -> None:
    scenario = Scenario(machine=MACHINE, workload=WORKLOAD, method="live")
    sample = await take_sample(scenario, tmp_path / "image")
    threads = sample.tables["threads"]
    assert list(threads.columns) == list(COLUMNS["threads"])
    for window in ("before", "during"):
        rows = threads[threads["window"] == window]
        assert {"vCPU 0", "vCPU 1", "main loop"} <= set(rows["thread"])
        assert (rows["cpu_ns"] >= 0).all()
        window_ns = rows["window_ns"].iloc[0]
        longest_ns = window_ns + TICK_NS
        own = rows[rows["tid"].notna()]
        assert (own["cpu_ns"] <= longest_ns).all()
        available_ns = (psutil.cpu_count() or 1) * window_ns + len(rows) * TICK_NS
        assert rows["cpu_ns"].sum() <= available_ns
        guest = rows[rows["thread"].str.startswith("vCPU")]
        assert (guest["cpu_ns"] > 0).all()
    during = set(threads.loc[threads["window"] == "during", "thread"])
    # Those that ended before anybody looked are in the row of those that ended.
    assert during & {"snapshot thread", "ended"}
    # QEMU names its threads, but for one that may begin before it knows that it is to.
    assert "IO mon_iothread" in during
    assert sum("qemu" in name for name in during) <= 1
    assert sample.figures["qemu_cpu_ms"] > 0
    assert sample.figures["vcpu_wait_ms"] >= 0


async def test_host_memory_is_read_outside_of_what_is_timed(tmp_path: Path) -> None:
    scenario = Scenario(machine=MACHINE, workload=WORKLOAD, method="live-inline")
    sample = await take_sample(scenario, tmp_path / "image")
    memory: Any = sample.tables["host_memory"].set_index("reading")
    assert [memory.index.name, *memory.columns] == list(COLUMNS["host_memory"])
    progress = sample.tables["progress"]
    assert memory.loc["before", "t_ns"] < progress["t_ns"].iloc[0]
    assert progress["t_ns"].iloc[-1] < memory.loc["after", "t_ns"]
    assert (memory["resident_bytes"] > WORKLOAD.wss_mib << 20).all()
    assert (memory["huge_bytes"] <= memory["resident_bytes"]).all()
    assert (memory["page_cache_bytes"] > 0).all()
    figures = sample.figures
    # What differs cannot be more than what there is, and who loses a huge page splits its mapping,
    # but for a few MiB that QEMU gives back as a whole.
    assert figures["thp_lost_mib"] <= memory.loc["before", "huge_bytes"] / (1 << 20)
    assert figures["rss_growth_mib"] <= MACHINE.ram_mib + 256
    if figures["thp_lost_mib"] > 0:
        assert figures["thp_splits"] * 2 + 8 >= figures["thp_lost_mib"]


@pytest.mark.usefixtures("permission_to_rebuild")
async def test_huge_pages_that_a_snapshot_split_are_put_together_again(tmp_path: Path) -> None:
    machine = dataclasses.replace(MACHINE, thp=True)
    instruments = Instruments(rebuild_huge_pages=True)
    scenario = Scenario(machine=machine, workload=WORKLOAD, method="live", instruments=instruments)
    sample = await take_sample(scenario, tmp_path / "image", verify=True)
    figures = sample.figures
    if not sample.tables["host_memory"]["huge_bytes"].iloc[0]:
        pytest.skip("this host had no huge pages to give")
    assert figures["verified"]
    assert figures["thp_lost_mib"] > 0
    # Only where the host has none to give is less put together than was lost.
    assert figures["rebuilt_mib"] > 0
    assert figures["rebuild_ms"] > 0
    assert figures["rate_before_rebuild"] > 0
    assert figures["rate_after_rebuild"] > 0


@pytest.mark.usefixtures("permission_to_rebuild")
async def test_memory_that_is_not_to_be_huge_is_not_rebuilt(tmp_path: Path) -> None:
    async with lab.boot(dataclasses.replace(MACHINE, thp=False), WORKLOAD) as vm:
        with pytest.raises(HostError, match="none of the guest's memory"):
            await rebuild_huge_pages(vm)
        assert await vm.verify_working_set() == 0


@pytest.mark.parametrize("method", ["live", "migrate-to-file"])
async def test_without_instruments_a_snapshot_is_taken_all_the_same(
    method: str, tmp_path: Path
) -> None:
    on = [name for name, value in to_json(Instruments()).items() if value is True]
    off = Instruments(**dict.fromkeys(on, False))
    scenario = Scenario(machine=MACHINE, workload=WORKLOAD, method=method, instruments=off)
    sample = await take_sample(scenario, tmp_path / "image", verify=method == "live")
    assert sample.outcome == "ok"
    assert set(sample.tables) <= {"progress", "phases"}
    unknown = ("faults", "fault_p50_us", "qemu_cpu_ms", "vcpu_wait_ms", "rss_growth_mib")
    for name in (*unknown, "thp_lost_mib", "thp_splits", "page_cache_growth_mib"):
        assert sample.figures[name] is None
    assert sample.figures["lost_work_ms"] is not None


@pytest.mark.parametrize("method", ["live", "live-rfc", "live-inline"])
async def test_the_fault_log_has_exactly_the_faults_that_were_made(
    method: str, tmp_path: Path, platform: str
) -> None:
    # A prime: it is no multiple of anything that could be counted instead.
    scenario = Scenario(
        # Large enough that a sweep takes long to get to the pages, which are the last.
        machine=lab.Machine(ram_mib=768),
        workload=lab.Workload("idle", wss_mib=512),
        method=method,
        instruments=Instruments(known_faults=31),
    )
    sample = await take_sample(scenario, tmp_path / "image")
    assert sample.figures["known_faults_logged"] == 31
    # What else writes meanwhile is the guest itself, which a microguest need not.
    assert sample.figures["faults"] >= 31 + (not platform.startswith("micro"))
    assert not any("known faults" in warning for warning in sample.warnings)


async def test_more_known_faults_than_the_working_set_has_room_for_are_refused(
    tmp_path: Path,
) -> None:
    scenario = Scenario(
        machine=lab.Machine(ram_mib=128),
        workload=lab.Workload("idle", wss_mib=16),
        instruments=Instruments(known_faults=101),
    )
    with pytest.raises(lab.LabError, match=r"the working set reaches over \d+ pieces"):
        await take_sample(scenario, tmp_path / "image")
