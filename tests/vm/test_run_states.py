"""Whatever state a guest is in, a snapshot of it restores into that state, or is refused in a line;
and the guest stays as it is.
"""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

import lab
from lab.errors import RestoreError, SnapshotError
from lab.host.workdir import private_folder
from lab.qemu.build import find_qemu
from lab.scenario.methods import METHODS, Variant
from lab.session import VM
from lab.vm.commandline import Launch
from lab.vm.launch import launched
from tests.support.bench import begin, ended, until, until_status, works_on
from tests.support.door import Door, door, door_arguments, single_step

pytestmark = [pytest.mark.vm, pytest.mark.platforms("micro-tcg")]

WORKLOAD = lab.Workload("random", wss_mib=4)
LIVE = tuple(
    name
    for name, how in METHODS.items()
    # Past the page cache there is nothing else about a run state, and not every disk permits it.
    if how.mechanism == "background" and how.runs_on("patched") and not how.direct_io
)
#: What the firmware would have done, had the guest any: where the registers are.
POWER_PORTS = 0x600
WATCHDOG_REGISTERS = 0xFEB00000
WATCHDOG_DEVICE = 4


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not the test's own: its name is too long for a socket.
    with private_folder("lab-door-") as made:
        yield made


def machine_with_door(folder: Path) -> lab.Machine:
    """A machine that can be brought into every state from outside.

    Its disk has no room for what is written to it.
    """
    full = "driver=blkdebug,node-name=full,image.driver=null-co,image.size=1048576"
    full += ",inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.errno=28"
    return lab.Machine(
        guest="micro",
        ram_mib=32,
        extra_args=(
            *door_arguments(folder),
            *("-blockdev", full, "-device", "ide-hd,bus=ide.0,drive=full,werror=stop"),
            *("-device", "pvpanic"),
            *("-device", f"i6300esb,addr={WATCHDOG_DEVICE}"),
        ),
    )


# The way into each state


async def prelaunch(vm: VM, _: Door, __: Path) -> None:
    await vm.stop()
    await vm.reset()


async def paused(vm: VM, _: Door, __: Path) -> None:
    await vm.stop()


async def running(vm: VM, _: Door, __: Path) -> None:
    assert await vm.is_running()


async def io_error(__: VM, at: Door, ___: Path) -> None:
    for port, value in ((0x3F6, 2), (0x1F2, 1), (0x1F3, 0), (0x1F4, 0), (0x1F5, 0), (0x1F6, 0xE0)):
        await at.send(f"outb {port:#x} {value:#x}")
    await at.send("outb 0x1f7 0x30")  # write a sector
    for _ in range(256):
        await at.send("outw 0x1f0 0x4c41")


async def debug(vm: VM, _: Door, folder: Path) -> None:
    await single_step(vm, folder)


async def watchdog(vm: VM, at: Door, _: Path) -> None:
    await vm.execute("set-action", {"watchdog": "pause"})
    await at.configure(WATCHDOG_DEVICE, 0, 0x10, WATCHDOG_REGISTERS)
    await at.configure(WATCHDOG_DEVICE, 0, 0x04, 2)  # its registers answer
    await at.configure(WATCHDOG_DEVICE, 0, 0x60, 4, "outw")  # it counts fast, and resets in the end
    for register in (0, 4):  # both of its timers are short
        await at.send(f"writeb {WATCHDOG_REGISTERS + 0xC:#x} 0x80")
        await at.send(f"writeb {WATCHDOG_REGISTERS + 0xC:#x} 0x86")
        await at.send(f"writel {WATCHDOG_REGISTERS + register:#x} 16")
    await at.configure(WATCHDOG_DEVICE, 0, 0x68, 2, "outb")  # and nobody feeds it


async def guest_panicked(vm: VM, at: Door, _: Path) -> None:
    await vm.execute("set-action", {"panic": "pause"})
    await at.send("outb 0x505 1")


async def suspended(_: VM, at: Door, __: Path) -> None:
    await at.configure(1, 3, 0x40, POWER_PORTS | 1)
    await at.configure(1, 3, 0x80, 1)
    await at.send(f"outw {POWER_PORTS + 4:#x} 0x2400")  # sleep, to RAM


async def shutdown(vm: VM, _: Door, __: Path) -> None:
    await vm.execute("set-action", {"reboot": "shutdown", "shutdown": "pause"})
    await vm.execute("system_reset")


Way = Callable[[VM, Door, Path], Awaitable[None]]
#: Every run state of QEMU's: the way into it, or the test or the reason that stands for it.
STATES: dict[str, Way | str] = {
    "running": running,
    "paused": paused,
    "suspended": suspended,
    "prelaunch": prelaunch,
    "io-error": io_error,
    "debug": debug,
    "watchdog": watchdog,
    "guest-panicked": guest_panicked,
    "shutdown": shutdown,
    "internal-error": "test_a_state_that_only_kvm_gets_into_is_kept_as_well",
    "inmigrate": "test_a_guest_that_has_not_been_restored_yet_is_not_snapshotted",
    "postmigrate": "test_a_guest_that_has_migrated_is_not_snapshotted",
    "restore-vm": "test_a_guest_that_has_failed_to_load_a_snapshot_is_not_snapshotted",
    "save-vm": "QEMU hears no command before it leaves it",
    "finish-migrate": "the pause of another migration, beside which QEMU refuses a second",
    "colo": "only QEMU's replication has it, which the lab does not build",
}
REACHED = {state: way for state, way in STATES.items() if not isinstance(way, str)}
GOES_ON = ("running", "suspended")


@contextlib.asynccontextmanager
async def guest_in(state: str, folder: Path, *, binary: Variant = "patched") -> AsyncIterator[VM]:
    """A guest that is in a run state."""
    async with (
        lab.boot(machine_with_door(folder), WORKLOAD, binary=binary) as vm,
        door(folder) as at,
    ):
        await REACHED[state](vm, at, folder)

        async def there() -> bool:
            return await vm.status() == state

        await until(there)
        yield vm


async def assert_restores_into(state: str, image: Path) -> None:
    async with lab.restore(image, paused=state not in GOES_ON) as again:
        assert await again.status() == state


async def test_the_table_has_every_run_state_of_qemu(folder: Path) -> None:
    async with lab.boot(machine_with_door(folder), WORKLOAD) as vm:
        schema = await vm.execute("query-qmp-schema")
    (known,) = [
        {member["name"] for member in each["members"]}
        for each in schema
        if each["meta-type"] == "enum"
        and {"prelaunch", "inmigrate", "io-error"} <= {m["name"] for m in each["members"]}
    ]
    assert set(STATES) == known
    assert all(way in globals() for way in STATES.values() if str(way).startswith("test_"))


@pytest.mark.parametrize("state", REACHED)
async def test_a_live_snapshot_restores_into_the_state_that_the_guest_was_in(
    state: str, folder: Path, tmp_path: Path
) -> None:
    """Field report F3."""
    image = tmp_path / "a.snap"
    async with guest_in(state, folder) as vm:
        for method in LIVE:
            await vm.snapshot(image, method, progress=False, checksums=False)
            assert await vm.status() == state, method
            await assert_restores_into(state, image)
        await vm.snapshot(image, "stop-and-copy", progress=False, checksums=False)
        await assert_restores_into("paused" if state in GOES_ON else state, image)
        if state == "running":
            await works_on(vm)


@pytest.mark.parametrize("state", REACHED)
async def test_the_unpatched_qemu_is_not_asked_for_what_would_end_it(
    state: str, folder: Path, tmp_path: Path
) -> None:
    """Field report F3, for the lab itself."""
    image = tmp_path / "a.snap"
    async with guest_in(state, folder, binary="unpatched") as vm:
        if state in (*GOES_ON, "paused"):
            await vm.snapshot(image, "background", progress=False)
            await assert_restores_into(state, image)
        else:
            with pytest.raises(SnapshotError, match=f"state {state}") as caught:
                await vm.snapshot(image, "background", progress=False)
            assert "\n" not in str(caught.value)
        if state in ("debug", "suspended"):
            with pytest.raises(SnapshotError, match=f"state {state}"):
                await vm.snapshot(image, "stop-and-copy", progress=False)
        else:
            await vm.snapshot(image, "stop-and-copy", progress=False)
            await assert_restores_into("paused" if state in GOES_ON else state, image)
        # It lives, and runs where it may.
        assert await vm.status() in (state, "postmigrate")


@pytest.mark.parametrize("state", ["guest-panicked", "shutdown", "io-error"])
@pytest.mark.parametrize("then", ["migrate_cancel", "migrate-continue"])
async def test_a_guest_that_was_started_in_the_hold_and_stopped_by_itself_is_left_so(
    state: str, then: str, folder: Path, tmp_path: Path
) -> None:
    """What has happened to it since is not to be undone, and QEMU lives."""
    async with lab.boot(machine_with_door(folder), WORKLOAD) as vm, door(folder) as at:

        async def there() -> bool:
            return await vm.status() == state

        await begin(vm, "live", tmp_path / "a.snap", hold=True)
        await until_status(vm, "pre-switchover")
        await vm.cont()
        await REACHED[state](vm, at, folder)
        await until(there)
        if then == "migrate_cancel":
            await vm.execute("migrate_cancel")
            await ended(vm, "cancelled")
        else:
            await vm.execute("migrate-continue", {"state": "pre-switchover"})
            reply = await ended(vm, "failed")
            assert "was started" in reply["error-desc"]
        assert await there()


async def test_a_guest_that_has_to_be_reset_first_is_not_told_to_run(
    folder: Path, tmp_path: Path
) -> None:
    image = tmp_path / "a.snap"
    async with guest_in("shutdown", folder) as vm:
        await vm.snapshot(image, "live", progress=False)
    with pytest.raises(RestoreError, match=r"state is shutdown.*paused=True.*vm\.reset\(\)"):
        async with lab.restore(image):
            pass
    async with lab.restore(image, paused=True) as again:
        await again.reset()
        await again.cont()
        await again.wait_ready()
        await works_on(again)


async def test_a_state_that_only_kvm_gets_into_is_kept_as_well(
    folder: Path, tmp_path: Path
) -> None:
    """KVM stops a guest in `internal-error` that it does not know how to run on."""
    image = tmp_path / "a.snap"
    async with guest_in("shutdown", folder) as vm:
        await vm.snapshot(image, "live", progress=False, checksums=False)
    content = image.read_bytes()
    before, after = (name.ljust(32, b"\0") for name in (b"shutdown", b"internal-error"))
    assert content.count(before) == 1
    image.write_bytes(content.replace(before, after))
    async with lab.restore(image, paused=True) as vm:
        assert await vm.status() == "internal-error"
        for method in LIVE:
            await vm.snapshot(tmp_path / "b.snap", method, progress=False, checksums=False)
            assert await vm.status() == "internal-error"
            await assert_restores_into("internal-error", tmp_path / "b.snap")


async def test_a_guest_that_has_not_been_restored_yet_is_not_snapshotted(
    folder: Path, tmp_path: Path
) -> None:
    launch = Launch(
        binary=find_qemu("patched"),
        machine=machine_with_door(folder),
        workload=WORKLOAD,
        incoming=True,
        paused=True,
    )
    async with launched(VM, launch) as vm:
        assert await vm.status() == "inmigrate"
        for method in LIVE:
            with pytest.raises(SnapshotError, match="waiting for an incoming migration"):
                await vm.snapshot(tmp_path / "a.snap", method, progress=False)
            assert await vm.status() == "inmigrate"


async def test_a_guest_that_has_migrated_is_not_snapshotted(folder: Path, tmp_path: Path) -> None:
    async with guest_in("paused", folder) as vm:
        await vm.snapshot(tmp_path / "a.snap", "stop-and-copy", progress=False)
        assert await vm.status() == "postmigrate"
        for method in LIVE:
            with pytest.raises(SnapshotError, match=r"twice.*vm\.cont\(\)"):
                await vm.snapshot(tmp_path / "b.snap", method, progress=False)
        await vm.cont()
        await works_on(vm)


@pytest.mark.parametrize("binary", ["patched", "unpatched"])
async def test_a_guest_that_has_failed_to_load_a_snapshot_is_not_snapshotted(
    binary: Variant, folder: Path, tmp_path: Path
) -> None:
    methods = [name for name, how in METHODS.items() if how.runs_on(binary) and not how.direct_io]
    async with guest_in("running", folder, binary=binary) as vm:
        assert "Error" in await vm.hmp("loadvm none")
        for method in methods:
            # Such a QEMU would end from every kind of migration.
            with pytest.raises(SnapshotError, match=r"load|restore-vm"):
                await vm.snapshot(tmp_path / "a.snap", method, progress=False)
            assert await vm.status() == "restore-vm"
    assert list(tmp_path.iterdir()) == []
