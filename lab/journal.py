"""Things that come one after the other, kept in order, and awaited."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


class Journal(Generic[_T]):
    """What came so far.  Not shared between threads.

    `problem` is an error that ends every wait for what has not come: nothing more comes, or what
    came is of no use.  It can be taken back.
    """

    def __init__(self) -> None:
        self.entries: list[_T] = []
        """Everything, oldest first."""
        self.problem: Exception | None = None
        self._changed = asyncio.Event()

    def add(self, entry: _T) -> None:
        """Add an entry, and wake those that wait."""
        self.entries.append(entry)
        self._wake()

    def fail(self, problem: Exception) -> None:
        """Have every wait end with `problem`, unless there is one that does already."""
        self.problem = self.problem or problem
        self._wake()

    def _wake(self) -> None:
        # A new one for those that come next; clearing this one would not wake those that wait.
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def first(self, wanted: Callable[[_T], bool], *, since: int = 0, timeout_s: float) -> _T:
        """Return the first entry that `wanted` accepts among `entries[since:]`, present or to come.

        Take `since = len(journal.entries)` before what causes the entry.

        :raise TimeoutError: when the time is over.
        :raise Exception: `problem`, when no entry that is there is wanted.
        """
        checked = since
        async with asyncio.timeout(timeout_s):
            while True:
                changed = self._changed
                while checked < len(self.entries):
                    entry = self.entries[checked]
                    checked += 1
                    if wanted(entry):
                        return entry
                if self.problem is not None:
                    raise self.problem
                await changed.wait()


@contextlib.asynccontextmanager
async def meanwhile(
    work: Coroutine[Any, Any, None], name: str
) -> AsyncIterator[asyncio.Task[None]]:
    """Do `work` in a task of its own while the context lasts, and cancel what is left of it then.

    Await the task that the context gives to have all of it done, or what it raises raised.
    """
    task = asyncio.create_task(work, name=name)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def read_meanwhile(
    reading: Coroutine[Any, Any, None], writer: asyncio.StreamWriter, name: str
) -> AsyncIterator[None]:
    """Run `reading`, which fills a journal from a connection, while the context lasts; then close
    the connection.
    """
    try:
        async with meanwhile(reading, name):
            yield
    finally:
        writer.close()
        # The other end may be gone.
        with contextlib.suppress(OSError):
            await writer.wait_closed()
