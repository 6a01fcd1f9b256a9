"""Stop the guest, and copy all of its RAM."""

from collections.abc import Awaitable, Callable

from lab.snapshot.mechanisms.base import Hold, Mechanism
from lab.vm.vm import RunningVM


class Stopped(Mechanism):
    """An ordinary migration of a guest that is stopped for all of it."""

    async def request(
        self,
        vm: RunningVM,
        migrate: Callable[[], Awaitable[None]],
        hold: Hold | None,
        was_running: bool,
    ) -> None:
        await vm.stop()
        await migrate()
