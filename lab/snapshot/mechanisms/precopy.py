"""Copy RAM while the guest runs until little is left, and stop it for the rest."""

from typing import ClassVar

from lab.errors import SnapshotError
from lab.snapshot.mechanisms.base import LIVE_STATES, Mechanism
from lab.vm.vm import RunningVM

_SMALL_BYTES = 1 << 20
"""What a RAM block is smaller than that holds firmware, which no guest writes to."""


class Precopy(Mechanism):
    """QEMU's ordinary migration, to a file."""

    writes_again: ClassVar[bool] = True

    async def check(self, vm: RunningVM, state: str) -> None:
        await super().check(vm, state)
        if self.variant == "unpatched" and vm.machine.accel == "tcg" and state in LIVE_STATES:
            await _require_one_block(vm)

    def expected_bytes(self, resident: int) -> int:
        # It writes a page again whenever the guest has; half more is usual under load.
        return resident * 3 // 2


async def _require_one_block(vm: RunningVM) -> None:
    """Refuse RAM in several blocks, of which upstream loses pages; see lab/qemu/README.md."""
    large = [block.name for block in await vm.ram_blocks() if block.used_bytes >= _SMALL_BYTES]
    if len(large) > 1:
        raise SnapshotError(
            f"the unpatched QEMU under TCG would lose what the guest writes to {large[1]} in a "
            "migration",
            "use the patched QEMU, KVM or stop-and-copy",
        )
