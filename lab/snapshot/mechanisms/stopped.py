"""Stop the guest, and copy all of its RAM."""

from lab.snapshot.mechanisms.base import Course, Mechanism


class Stopped(Mechanism):
    """An ordinary migration of a guest that is stopped for all of it."""

    async def request(self, course: Course) -> None:
        await course.vm.stop()
        await course.migrate()
