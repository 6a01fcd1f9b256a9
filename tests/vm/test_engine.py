"""What the patches promise beyond the images: failures that leave the guest running, and a record
of what was done.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import lab
from lab.vm import VM, file_channel

pytestmark = pytest.mark.vm

ENDED = ("completed", "failed", "cancelled")
#: In the order of the RFC; `hold` and `populate` may be missing.
RFC_ORDER = (
    "populate",
    "setup",
    "stop",
    "hold",
    "arm",
    "device-state",
    "resume",
    "complete",
    "release",
)


@pytest.fixture
async def vm() -> AsyncIterator[VM]:
    machine = lab.Machine(ram_mib=256)
    async with lab.boot(machine, lab.Workload("random", wss_mib=32)) as booted:
        yield booted


async def begin(
    vm: VM, image: Path, parameters: Mapping[str, object], *, hold: bool = False
) -> None:
    states = {"background-snapshot": True, "pause-before-switchover": hold}
    await vm.execute(
        "migrate-set-capabilities",
        {"capabilities": [{"capability": name, "state": on} for name, on in states.items()]},
    )
    await vm.execute("migrate-set-parameters", parameters)
    await vm.execute("migrate", {"channels": file_channel(image)})


async def until_status(vm: VM, *wanted: str) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while True:
            reply: dict[str, Any] = await vm.execute("query-migrate")
            if reply.get("status") in wanted:
                return reply
            await asyncio.sleep(0.01)


async def until_running(vm: VM) -> None:
    """The guest runs and gets something done; the main loop may still be about to start it."""
    async with asyncio.timeout(60):
        while True:
            if await vm.is_running():
                break
            await asyncio.sleep(0.01)
        before = (await vm.progress_page()).total_ops
        while True:
            if (await vm.progress_page()).total_ops > before:
                return
            await asyncio.sleep(0.01)


async def works_once_more(vm: VM, image: Path) -> None:
    await begin(vm, image, {"x-snapshot-engine": "rfc", "x-snapshot-fault-log": ""})
    assert (await until_status(vm, *ENDED))["status"] == "completed"
    await until_running(vm)


async def test_untouched_parameters_mean_upstreams_engine_and_no_log(vm: VM) -> None:
    parameters = await vm.execute("query-migrate-parameters")
    assert parameters["x-snapshot-engine"] == "inline"
    assert not parameters.get("x-snapshot-fault-log")


async def test_a_snapshot_that_fails_before_the_pause_leaves_the_guest_running(
    vm: VM, tmp_path: Path
) -> None:
    await begin(vm, tmp_path / "image", {"x-snapshot-fault-log": str(tmp_path / "no" / "log")})
    failed = await until_status(vm, *ENDED)
    assert failed["status"] == "failed"
    assert "fault log" in failed["error-desc"]
    await until_running(vm)
    await works_once_more(vm, tmp_path / "image")


@pytest.mark.parametrize("engine", ["inline", "rfc", "copy"])
async def test_cancelling_a_held_snapshot_starts_the_guest(
    vm: VM, tmp_path: Path, engine: str
) -> None:
    await begin(vm, tmp_path / "image", {"x-snapshot-engine": engine}, hold=True)
    await until_status(vm, "pre-switchover")
    assert not await vm.is_running()
    await vm.execute("migrate_cancel")
    assert (await until_status(vm, *ENDED))["status"] == "cancelled"
    await until_running(vm)
    await works_once_more(vm, tmp_path / "image")


async def test_starting_a_held_guest_fails_its_snapshot_and_it_runs_on(
    vm: VM, tmp_path: Path
) -> None:
    await begin(vm, tmp_path / "image", {}, hold=True)
    await until_status(vm, "pre-switchover")
    await vm.execute("cont")
    await vm.execute("migrate-continue", {"state": "pre-switchover"})
    assert (await until_status(vm, *ENDED))["status"] == "failed"
    await until_running(vm)
    await works_once_more(vm, tmp_path / "image")


@pytest.mark.parametrize("engine", ["inline", "rfc", "copy"])
async def test_cancelling_the_sweep_releases_the_guest(vm: VM, tmp_path: Path, engine: str) -> None:
    await begin(vm, tmp_path / "image", {"x-snapshot-engine": engine})
    async with asyncio.timeout(60):
        while True:
            reply = await vm.execute("query-migrate")
            phases = [entry["phase"] for entry in reply.get("snapshot", {}).get("phases", ())]
            if "sweep" in phases:
                break
    await vm.execute("migrate_cancel")
    await until_status(vm, "cancelled", "completed")
    await until_running(vm)
    await works_once_more(vm, tmp_path / "image")


async def test_phases_follow_each_other_in_the_order_of_the_rfc(vm: VM, tmp_path: Path) -> None:
    await begin(vm, tmp_path / "image", {"x-snapshot-engine": "rfc"})
    await until_status(vm, "completed")
    async with asyncio.timeout(60):
        while True:
            snapshot = (await vm.execute("query-migrate"))["snapshot"]
            phases = {entry["phase"]: entry for entry in snapshot["phases"]}
            if "end-ns" in phases.get("release", {}):
                break
            await asyncio.sleep(0.01)
    assert snapshot["engine"] == "rfc"
    now = snapshot["start-ns"]
    for name in RFC_ORDER:
        if name in phases:
            assert now <= phases[name]["start-ns"] <= phases[name]["end-ns"]
            # The device state is appended by the snapshot thread; the main thread resumes.
            now = phases[name]["end-ns" if name != "resume" else "start-ns"]
    assert phases["sweep"]["start-ns"] >= phases["device-state"]["end-ns"]
    assert phases["sweep"]["end-ns"] <= phases["complete"]["start-ns"]
