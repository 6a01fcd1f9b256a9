"""What the patches promise beyond the images: failures that leave the guest running, and a record
of what was done.
"""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import lab
from lab.measure.sample import filesystem_of
from lab.session import VM
from tests.support.bench import begin, ended, is_left_alone, until_status

pytestmark = [pytest.mark.vm, pytest.mark.platforms("tcg", "kvm", "micro-kvm")]

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


async def works_once_more(vm: VM, image: Path) -> None:
    await begin(vm, "live-rfc", image)
    await ended(vm, "completed")
    await is_left_alone(vm)


async def test_untouched_parameters_mean_upstreams_engine_and_no_log(vm: VM) -> None:
    parameters = await vm.execute("query-migrate-parameters")
    assert parameters["x-snapshot-engine"] == "inline"
    assert not parameters.get("x-snapshot-fault-log")


async def test_a_snapshot_that_fails_before_the_pause_leaves_the_guest_running(
    vm: VM, tmp_path: Path
) -> None:
    log = tmp_path / "no" / "log"
    await begin(vm, "live-inline", tmp_path / "image", x_snapshot_fault_log=str(log))
    failed = await ended(vm, "failed")
    assert "fault log" in failed["error-desc"]
    await is_left_alone(vm)
    await works_once_more(vm, tmp_path / "image")


async def test_starting_a_held_guest_fails_its_snapshot_and_it_runs_on(
    vm: VM, tmp_path: Path
) -> None:
    await begin(vm, "live-inline", tmp_path / "image", hold=True)
    await until_status(vm, "pre-switchover")
    await vm.execute("cont")
    await vm.execute("migrate-continue", {"state": "pre-switchover"})
    await ended(vm, "failed")
    await is_left_alone(vm)
    await works_once_more(vm, tmp_path / "image")


async def test_phases_follow_each_other_in_the_order_of_the_rfc(vm: VM, tmp_path: Path) -> None:
    await begin(vm, "live-rfc", tmp_path / "image")
    snapshot = (await ended(vm, "completed"))["snapshot"]
    phases = {entry["phase"]: entry for entry in snapshot["phases"]}
    assert snapshot["engine"] == "rfc"
    now = snapshot["start-ns"]
    for name in RFC_ORDER:
        if name in phases:
            assert now <= phases[name]["start-ns"] <= phases[name]["end-ns"]
            # The device state is appended by the snapshot thread; the main thread resumes.
            now = phases[name]["end-ns" if name != "resume" else "start-ns"]
    assert phases["sweep"]["start-ns"] >= phases["device-state"]["end-ns"]
    assert phases["sweep"]["end-ns"] <= phases["complete"]["start-ns"]


async def test_room_is_reserved_for_all_of_the_image_and_given_back(tmp_path: Path) -> None:
    """ext4 writes the whole image out when it is closed, if one block of it has no room yet."""
    if filesystem_of(tmp_path) == "tmpfs":
        pytest.skip("no room is reserved on tmpfs")
    trace, image = tmp_path / "trace", tmp_path / "image"
    # It goes to the log, and to a file of its own, in the current folder if none is named.
    event = f"enable=bg_snapshot_reserve,file={tmp_path / 'simple'}"
    machine = lab.Machine(ram_mib=256, extra_args=("-D", str(trace), "-trace", event))
    async with lab.boot(machine, lab.Workload("random", wss_mib=160)) as vm:
        await begin(vm, "live", image)
        await ended(vm, "completed")
        await is_left_alone(vm)

    pieces = re.findall(r"bg_snapshot_reserve from (\d+), (\d+) bytes", trace.read_text())
    end = 0
    for start, size in pieces:
        assert int(start) == end
        end += int(size)
    assert len(pieces) > 1
    stat = image.stat()
    assert end >= stat.st_size
    assert stat.st_blocks * 512 < stat.st_size + (1 << 20)
