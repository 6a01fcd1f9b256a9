"""What is written to flash while its machine is snapshotted is not in the image."""

import asyncio
from pathlib import Path

import pytest

import lab
from lab.verify.oracle import verify_method
from lab.vm.flash import flash_writer
from lab.vm.qmp import Event

pytestmark = [pytest.mark.vm, pytest.mark.platforms("micro-tcg", "micro-kvm")]

BOUND_S = 120


def is_resume(event: Event) -> bool:
    return event.name == "RESUME"


def is_complete(event: Event) -> bool:
    return event.name == "MIGRATION" and event.data["status"] == "completed"


@pytest.mark.parametrize("method", ["live", "live-rfc", "live-inline"])
async def test_what_is_written_to_flash_meanwhile_is_not_in_the_image(
    method: str, tmp_path: Path
) -> None:
    machine = lab.Machine(ram_mib=128, flash=True)
    async with (
        lab.boot(machine, lab.Workload("random", wss_mib=16)) as vm,
        flash_writer(vm) as flash,
    ):
        since = len(vm.qmp.events)
        # Slow enough that there is time to write.
        judged = asyncio.create_task(verify_method(vm, method, tmp_path, storage_mib_per_s=40))
        await vm.qmp.wait_event(is_resume, since=since, timeout_s=BOUND_S)
        meanwhile = 0
        while not judged.done():
            await flash.write()
            if not any(is_complete(event) for event in vm.qmp.events[since:]):
                meanwhile = flash.writes
        found = await judged
    assert meanwhile > 1
    assert found.equal, found.detail
