"""Does a thread of QEMU wait for a page that nobody is going to release?

While a snapshot is taken, whoever writes to a page that is not saved yet waits in the kernel
(`handle_userfault`) until that page is released.  That takes microseconds, or as long as the disk
takes for what comes before.  A release that wakes nobody leaves its thread there to the end of the
snapshot, and neither the image nor the snapshot's outcome shows that.

So the threads are looked at every 50 ms.  Stuck is one that waits there all the time for more than
a second and has not had a single page in between, by its count of page faults.  Not counted is the
time in which QEMU's own snapshot threads wait for the disk, and that in which the lab holds the
guest.

What a thread waits in is shown by the kernel (`/proc/PID/task/TID/wchan`) to who may trace QEMU:
to root, and to the user who started it.  Where it is not shown nothing is found, and
`Watch.sees` is False.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

LIMIT_S = 1.0
POLL_S = 0.05
LONGEST_LOOK_S = 0.2
"""What one look may count for: on a busy host the next can be late, and what the snapshot's threads
did in between, such as waiting for the disk, nobody has seen."""

_WAITS_FOR_A_PAGE = "handle_userfault"
_SNAPSHOT_THREADS = "mig/"
"""How the names of QEMU's own threads begin that take snapshots."""


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What one look at a thread shows.

    `waits_in` is the kernel's function, empty when it runs or the kernel does not say; `faults`
    how many pages it has had so far; `is_blocked` whether it waits for what cannot be interrupted,
    such as a disk.
    """

    tid: int
    name: str
    waits_in: str
    faults: int
    is_blocked: bool

    @property
    def waits_for_a_page(self) -> bool:
        """Whether it waits until somebody releases a page."""
        return self.waits_in == _WAITS_FOR_A_PAGE

    @property
    def waits_for_the_disk(self) -> bool:
        """Whether this is a thread of the snapshot that waits for the image's disk."""
        blocked = self.is_blocked and not self.waits_for_a_page
        return blocked and self.name.startswith(_SNAPSHOT_THREADS)


def look(pid: int) -> list[Sight]:
    """Return what each thread of a process does; none of a process that has ended."""
    found = []
    with contextlib.suppress(OSError):
        for folder in Path(f"/proc/{pid}/task").iterdir():
            # It may end meanwhile.
            with contextlib.suppress(OSError):
                found.append(_sight(folder))
    return found


def _sight(folder: Path) -> Sight:
    name, state = _name_and_state((folder / "stat").read_text())
    waits_in = (folder / "wchan").read_text()
    return Sight(
        tid=int(folder.name),
        name=name,
        waits_in="" if waits_in == "0" else waits_in,
        # Minor and major ones.  A fault that waits is counted when it is over.
        faults=int(state[7]) + int(state[9]),
        is_blocked=state[0] == "D",
    )


def _name_and_state(stat: str) -> tuple[str, list[str]]:
    # The name is in brackets, and may hold some itself.
    _, _, rest = stat.partition("(")
    name, _, fields = rest.rpartition(")")
    return name, fields.split()


@dataclass(kw_only=True)
class Watch:
    """Counts for how long each thread has waited for one page."""

    limit_s: float = LIMIT_S
    stuck: dict[int, str] = field(default_factory=dict)
    """The names of the threads that were found stuck, by id."""
    sees: bool = False
    """Whether the kernel shows what threads wait in."""
    _waits: dict[int, tuple[int, float]] = field(default_factory=dict)
    _then_s: float | None = None
    _suspended: bool = False

    @property
    def finding(self) -> str:
        """One line about the threads that were stuck, empty when none was."""
        names = ", ".join(sorted(set(self.stuck.values())))
        return f"waited over {self.limit_s:g} s for one page: {names}" if names else ""

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Count nothing for as long as the context lasts, because the guest is held."""
        self._suspended = True
        try:
            yield
        finally:
            self._suspended = False
            self._waits.clear()

    def note(self, now_s: float, sights: list[Sight]) -> None:
        """Take in what all threads do now."""
        self.sees = self.sees or any(sight.waits_in for sight in sights)
        passed_s = 0.0 if self._then_s is None else min(now_s - self._then_s, LONGEST_LOOK_S)
        self._then_s = now_s
        if self._suspended:
            return
        if any(sight.waits_for_the_disk for sight in sights):
            passed_s = 0.0
        waits = {}
        for sight in sights:
            if not sight.waits_for_a_page:
                continue
            faults, waited_s = self._waits.get(sight.tid, (sight.faults, 0.0))
            is_new = sight.tid not in self._waits or faults != sight.faults
            waited_s = 0.0 if is_new else waited_s + passed_s
            waits[sight.tid] = (sight.faults, waited_s)
            if waited_s > self.limit_s:
                self.stuck[sight.tid] = sight.name
        self._waits = waits


@contextlib.asynccontextmanager
async def watching(
    pid: int,
    *,
    limit_s: float = LIMIT_S,
    look: Callable[[int], list[Sight]] = look,
) -> AsyncIterator[Watch]:
    """Look at the threads of a process for as long as the context lasts.

    Nothing is raised: what was found is in the `Watch`, and is complete when the context is left.
    """
    watch = Watch(limit_s=limit_s)

    async def keep_looking() -> None:
        while True:
            watch.note(time.monotonic(), look(pid))
            await asyncio.sleep(POLL_S)

    task = asyncio.create_task(keep_looking(), name="watching for stuck threads")
    try:
        yield watch
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if not task.cancelled():
            task.result()
