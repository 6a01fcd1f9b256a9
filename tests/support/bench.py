"""What the tests of QEMU's snapshots share: its own commands, without the lab between, and what has
to be true of a guest afterwards.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lab
from lab.errors import LabError, RestoreError
from lab.scenario.methods import METHODS
from lab.session import VM
from lab.snapshot.image import file_channel
from lab.vm.qmp import COMMAND_TIMEOUT_S

ENDED = ("completed", "failed", "cancelled")
CAPABILITIES = ("background-snapshot", "mapped-ram", "pause-before-switchover")

#: How long anything may take on a busy machine, in seconds.
PATIENCE_S = 120.0

Channels = Sequence[Mapping[str, object]]


def small(vcpus: int = 1, *, thp: bool | None = None) -> tuple[lab.Machine, lab.Workload]:
    """The smallest guest that writes enough to run into every engine's faults."""
    machine = lab.Machine(ram_mib=128, vcpus=vcpus, thp=thp)
    return machine, lab.Workload("random", wss_mib=24, threads=vcpus)


async def until(reached: Callable[[], Awaitable[bool]]) -> None:
    """Wait for what has no event to wait for."""
    async with asyncio.timeout(PATIENCE_S):
        while not await reached():
            await asyncio.sleep(0.005)


# What is sent to QEMU


async def configure(vm: VM, method: str, *, hold: bool = False, **parameters: object) -> None:
    """Set QEMU up for a snapshot by a method of the lab's.

    :param hold: stop at the instant that the image shows until `migrate-continue`.
    :param parameters: further migration parameters, with `_` for `-`.
    """
    how = METHODS[method]
    wanted = {*how.capabilities, *(["pause-before-switchover"] if hold else [])}
    states = [{"capability": name, "state": name in wanted} for name in CAPABILITIES]
    await vm.execute("migrate-set-capabilities", {"capabilities": states})
    settings: dict[str, object] = {
        "x-snapshot-engine": how.engine,
        "x-snapshot-fault-log": "",
        "direct-io": how.direct_io,
        "max-bandwidth": 0,
    }
    settings |= {name.replace("_", "-"): value for name, value in parameters.items()}
    await vm.execute("migrate-set-parameters", settings)


async def start(vm: VM, target: Path | Channels) -> None:
    """Begin a snapshot into a file, or into something else."""
    channels = file_channel(target) if isinstance(target, Path) else target
    await vm.execute("migrate", {"channels": channels})


async def begin(
    vm: VM, method: str, target: Path | Channels, *, hold: bool = False, **parameters: object
) -> None:
    """`configure` and `start`."""
    await configure(vm, method, hold=hold, **parameters)
    await start(vm, target)


# What QEMU says


async def info(vm: VM) -> dict[str, Any]:
    """What QEMU says about its migration."""
    reply: dict[str, Any] = await vm.execute("query-migrate")
    return reply


async def until_status(vm: VM, *wanted: str) -> dict[str, Any]:
    """Wait for one of the states, and return what QEMU says then."""
    reply: dict[str, Any] = {}

    async def reached() -> bool:
        nonlocal reply
        reply = await info(vm)
        return reply.get("status") in wanted

    await until(reached)
    return reply


def phases(reply: Mapping[str, Any]) -> dict[str, bool]:
    """The phases that have begun, and for each whether it has ended."""
    listed = reply.get("snapshot", {}).get("phases", ())
    return {entry["phase"]: "end-ns" in entry for entry in listed}


async def until_phase(vm: VM, phase: str) -> None:
    """Wait until a phase has begun, of the guest's first snapshot or one that `start` began.

    Until QEMU is told to begin another, it lists the phases of the one before.
    """

    async def reached() -> bool:
        return phase in phases(await info(vm))

    await until(reached)


async def until_idle(vm: VM) -> None:
    """Wait until QEMU could do another migration: its yank instance goes away last."""

    async def reached() -> bool:
        return all(each["type"] != "migration" for each in await vm.execute("query-yank"))

    await until(reached)


async def ended(vm: VM, *wanted: str) -> dict[str, Any]:
    """Wait until QEMU is through with the snapshot; assert how it ended, and that it says why."""
    await until_status(vm, *ENDED)
    # There is no event for the reason and for the last phase; QEMU has them before it cleans up.
    await until_idle(vm)
    reply = await info(vm)
    assert reply["status"] in wanted, reply
    if reply["status"] == "failed":
        assert reply.get("error-desc"), reply
    return reply


# What the host sees


def _descriptors(vm: VM) -> dict[str, str]:
    """What each descriptor of QEMU refers to."""
    found = {}
    for entry in Path(f"/proc/{vm.pid}/fd").iterdir():
        # It may be closed meanwhile.
        with contextlib.suppress(FileNotFoundError):
            found[entry.name] = str(entry.readlink())
    return found


def is_open(vm: VM, path: Path) -> bool:
    """Whether QEMU has a file open."""
    return str(path) in _descriptors(vm).values()


def _userfaultfds(vm: VM) -> list[str]:
    # Not /dev/userfaultfd, from which QEMU makes them and which it keeps open.
    return [n for n, name in _descriptors(vm).items() if name == "anon_inode:[userfaultfd]"]


def userfaults(vm: VM) -> int:
    """How many userfaultfds QEMU holds open: one while a snapshot protects memory."""
    return len(_userfaultfds(vm))


def protected_mappings(vm: VM) -> int:
    """How many mappings of QEMU the kernel tracks writes to."""
    lines = Path(f"/proc/{vm.pid}/smaps").read_text().splitlines()
    flags = [line.split()[1:] for line in lines if line.startswith("VmFlags:")]
    return sum("uw" in each for each in flags)


async def works_on(vm: VM) -> None:
    """Assert that the guest runs, completes operations and has found no error of its own."""
    await until(vm.is_running)
    before = await vm.progress_page()
    now = before

    async def moved() -> bool:
        nonlocal now
        now = await vm.progress_page()
        return now.total_ops > before.total_ops

    await until(moved)
    assert now.page_errors == 0
    assert now.nonce == vm.ready.nonce


async def is_left_alone(vm: VM) -> None:
    """Assert that the guest works on, and nothing of the snapshot is left to hinder it."""
    await works_on(vm)
    assert userfaults(vm) == 0
    assert protected_mappings(vm) == 0


async def refusal(image: Path) -> str:
    """Assert that an image is not restored; return the line that says why."""
    try:
        async with lab.restore(image, paused=True):
            pass
    except RestoreError as error:
        line = str(error)
    else:
        raise AssertionError(f"{image} was restored")
    assert "\n" not in line
    return line


def waiting_writers(vm: VM) -> int:
    """How many threads wait until somebody releases a page that they want to write to."""
    found = 0
    for number in _userfaultfds(vm):
        for line in Path(f"/proc/{vm.pid}/fdinfo/{number}").read_text().splitlines():
            name, _, value = line.partition(":")
            found += int(value) if name == "total" else 0
    return found


class Stand:
    """One guest for many tests, which is booted again after a test that left it in disorder."""

    def __init__(self, machine: lab.Machine, workload: lab.Workload) -> None:
        self._machine = machine
        self._workload = workload
        self._stack = contextlib.AsyncExitStack()
        self._vm: VM | None = None

    async def guest(self) -> VM:
        """Return a guest that runs, with no snapshot going on."""
        if self._vm is not None:
            try:
                async with asyncio.timeout(COMMAND_TIMEOUT_S):
                    await until_idle(self._vm)
                    await is_left_alone(self._vm)
            except (LabError, AssertionError, TimeoutError):
                await self.close()
        if self._vm is None:
            self._vm = await self._stack.enter_async_context(
                lab.boot(self._machine, self._workload)
            )
        return self._vm

    async def close(self) -> None:
        """End the guest, if there is one."""
        self._vm = None
        await self._stack.aclose()
