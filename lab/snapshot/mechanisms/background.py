"""Save RAM while the guest runs, in the state of one instant: QEMU's background snapshot.

The patched QEMU has several engines for it, logs the guest's write faults and can be held at that
instant.  The unpatched one has one engine, no log and no hold.
"""

import contextlib
from typing import ClassVar

from lab.errors import HostError, LabError, QmpError, SnapshotError
from lab.host.needs import require_uffd
from lab.snapshot.escapes import require_none
from lab.snapshot.mechanisms.base import (
    ENDED,
    LIVE_STATES,
    RUN_FIRST,
    UNTRANSFERABLE,
    Course,
    Mechanism,
    until,
)
from lab.vm.vm import RunningVM


class _Background(Mechanism):
    """What the QEMUs have in common: the vCPUs go on by themselves."""

    fatal_states: ClassVar[tuple[str, ...]] = UNTRANSFERABLE

    def explain(self, vm: RunningVM, error: QmpError) -> LabError | None:
        if "not supported by host kernel" in error.cause:
            require_uffd()  # says which of the reasons it is, if this process is refused too
            return HostError(
                f"{self.how.name} needs userfaultfd write protection: {error.cause}",
                "run as root on Linux 5.7 or later, or set vm.unprivileged_userfaultfd=1; "
                "`lab doctor` says which",
            )
        if "guest memory configuration" in error.cause:
            return HostError(
                f"{self.how.name} cannot write-protect guest RAM of kind "
                f"{vm.machine.ram_kind}: {error.cause}",
                _unprotectable_remedy(vm.machine.ram_kind),
            )
        return None

    async def finish(self, course: Course) -> None:
        """Nothing: the guest was let go long ago."""

    async def free_guest(self, vm: RunningVM) -> None:
        """Have QEMU release the guest's memory although the image's disk may not answer.

        The guest may wait for a page with QEMU's big lock held, as when an interrupt is delivered.
        Then QEMU would not hear of being cancelled before the disk answers.
        """
        with contextlib.suppress(QmpError):  # no migration has begun
            instances = [{"type": "migration"}]
            await vm.qmp.execute("yank", {"instances": instances}, out_of_band=True)


class PatchedBackground(_Background):
    """With an engine of the patched QEMU, which is held at its pre-switchover."""

    logs_faults: ClassVar[bool] = True
    overlays: ClassVar[str] = "x-snapshot-overlays"

    def capabilities(self, *, hold: bool) -> dict[str, bool]:
        return {"pause-before-switchover": hold, **super().capabilities(hold=hold)}

    def parameters(self, fault_log: str) -> dict[str, object]:
        return {"x-snapshot-engine": self.how.engine, "x-snapshot-fault-log": fault_log}

    async def reset(self, vm: RunningVM) -> None:
        await vm.execute("migrate-set-parameters", {"x-snapshot-fault-log": ""})


class UnpatchedBackground(_Background):
    """With upstream's engine.  It cannot be held, so the guest is stopped and held before."""

    def check_state(self, state: str) -> None:
        super().check_state(state)
        if state not in (*LIVE_STATES, "paused"):
            raise SnapshotError(
                f"the unpatched QEMU would end from a {self.how.name} snapshot of a guest that is "
                f"stopped in the state {state}",
                f"take it with stop-and-copy, {RUN_FIRST}",
            )

    async def check(self, vm: RunningVM, state: str) -> None:
        await super().check(vm, state)
        await require_none(vm, self.how.name)

    async def request(self, course: Course) -> None:
        vm = course.vm
        if course.hold is None:
            await course.migrate()
            return

        async def has_begun() -> bool:
            reply = await vm.execute("query-migrate")
            return bool(reply.get("ram", {}).get("normal", 0)) or reply.get("status") in ENDED

        await vm.stop()
        await course.hold()
        await course.migrate()
        await until(has_begun, "begin a migration")
        if course.was_running:
            await vm.cont()


def _unprotectable_remedy(ram_kind: str) -> str:
    if ram_kind.startswith("file"):
        return "set LAB_RAM_DIR to a folder on a tmpfs: files elsewhere cannot be protected"
    return (
        "run on Linux 5.19 or newer, or use ram_kind anon; see wp-hugetlbfs-shmem in `lab doctor`"
    )
