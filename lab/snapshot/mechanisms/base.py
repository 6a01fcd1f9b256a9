"""What every mechanism answers, with the answers of an ordinary migration."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import ClassVar

from lab.errors import LabError, QmpError, SnapshotError
from lab.scenario.methods import Method
from lab.vm.vm import RunningVM

LIVE_STATES = ("running", "suspended")
"""The run states in which QEMU has to be stopped for a snapshot, and goes on afterwards."""

UNTRANSFERABLE = ("debug", "restore-vm")
"""Run states from which, or into which, the unpatched QEMU knows no way of a migration."""

ENDED = ("completed", "failed", "cancelled")
"""What a migration's status is at its end."""

RUN_FIRST = "let it run with vm.cont() first, or use the patched QEMU"

WAIT_TIMEOUT_S = 30.0
POLL_S = 0.001

Hold = Callable[[], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Course:
    """One snapshot as a mechanism sees it.

    :param migrate: sends QEMU the command `migrate`.
    :param hold: to be awaited at the instant that the image shows, the guest stopped there; None:
        it is not held.
    :param was_running: whether the guest is to run on afterwards.
    """

    vm: RunningVM
    migrate: Callable[[], Awaitable[None]]
    hold: Hold | None
    was_running: bool


@dataclass(frozen=True)
class Mechanism:
    """A migration that leaves the vCPUs stopped at its end.

    The entries are called in this order: `check`, `prepare` (`capabilities`, `parameters` and,
    where QEMU refuses them, `explain`), `request`, `finish`, `reset`; after a failure `free_guest`
    and `reset`.  `request` and `finish` are part of what is timed.
    """

    how: Method
    variant: str

    logs_faults: ClassVar[bool] = False
    """Whether QEMU writes a log of the guest's write faults."""

    overlays: ClassVar[str] = ""
    """The migration parameter by which QEMU puts overlays on disks at the instant by itself."""

    writes_again: ClassVar[bool] = False
    """Whether a page goes to the image again when the guest has written to it meanwhile."""

    fatal_states: ClassVar[tuple[str, ...]] = (*UNTRANSFERABLE, "suspended")
    """Run states in which the unpatched QEMU ends from this migration.  From `suspended` it would
    not end before it is to go on.
    """

    def check_state(self, state: str) -> None:
        """Refuse a snapshot in a run state that QEMU does not take or restore one in.

        :raise SnapshotError: naming the state.
        """
        if state == "postmigrate":
            raise SnapshotError(
                "QEMU cannot migrate a guest twice that has not run in between",
                "let it run with vm.cont() first, and stop it again if it has to be stopped",
            )
        # The patched one refuses by itself what it has to.
        if self.variant == "unpatched" and state in self.fatal_states:
            raise SnapshotError(
                f"the unpatched QEMU would end from migrating a guest in the state {state}",
                RUN_FIRST,
            )

    async def check(self, vm: RunningVM, state: str) -> None:
        """Refuse what would end QEMU or spoil the image, before anything is changed."""
        self.check_state(state)

    def capabilities(self, *, hold: bool) -> dict[str, bool]:
        """Return the migration capabilities to switch on."""
        return dict.fromkeys(self.how.capabilities, True)

    def parameters(self, fault_log: str) -> dict[str, object]:
        """Return the migration parameters besides those of every method.

        :param fault_log: where the log of faults goes; empty: there is none.
        """
        return {}

    def explain(self, vm: RunningVM, error: QmpError) -> LabError | None:
        """Return what a refusal of the capabilities means, where more is known than QEMU says."""
        return None

    async def request(self, course: Course) -> None:
        """Begin: every command from the first that affects the guest."""
        await course.migrate()

    async def finish(self, course: Course) -> None:
        """Once QEMU reports completion, hold the guest and let its vCPUs go on as soon as it may.

        QEMU reports completion just before it leaves the state `finish-migrate`, in which it
        refuses to continue.
        """
        if course.hold is not None:
            await course.hold()
        if course.was_running:

            async def is_final() -> bool:
                return await course.vm.status() != "finish-migrate"

            await until(is_final, "finish a migration")
            await course.vm.cont()

    async def free_guest(self, vm: RunningVM) -> None:
        """Before a migration is cancelled, let the guest go that it may hold."""

    async def reset(self, vm: RunningVM) -> None:
        """Switch off what `parameters` has switched on and would stay on."""

    def expected_bytes(self, resident: int) -> int:
        """Return about how much of the image are pages, of a guest with `resident` bytes."""
        return resident


async def until(reached: Callable[[], Awaitable[bool]], what: str) -> None:
    """Ask until `reached` says yes; there is no event for what is waited for here.

    :raise QmpError: after `WAIT_TIMEOUT_S`.
    """
    end = asyncio.get_running_loop().time() + WAIT_TIMEOUT_S
    while not await reached():
        if asyncio.get_running_loop().time() > end:
            raise QmpError(f"QEMU did not {what} within {WAIT_TIMEOUT_S:g} s")
        await asyncio.sleep(POLL_S)
