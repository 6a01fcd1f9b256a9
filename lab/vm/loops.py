"""Guests and event loops: a guest belongs to the loop that it was booted in.

Its monitor and its console are read by tasks of that loop, so nobody else can talk to it.  Whoever
tries is told so, in one line.

A loop that is closed while guests are left in it, as that of a notebook's subshell is, runs nothing
that could end them: they are ended as soon as anybody uses them or starts another guest.
"""

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Generic, TypeVar

from lab.errors import UsageError

T = TypeVar("T")


class OwnLoop:
    """The event loop that runs now, and the name of its thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.current_thread().name

    @property
    def has_ended(self) -> bool:
        """Whether nothing will ever run in it again."""
        return self._loop.is_closed()

    def check(self) -> None:
        """Raise `UsageError` in any other loop."""
        if asyncio.get_running_loop() is self._loop:
            return
        if self.has_ended:
            raise UsageError(
                f"this guest was booted in the event loop of thread {self._thread}, which has "
                "ended, and so has the guest",
                "boot it, or restore its snapshot, in the loop that uses it",
            )
        raise UsageError(
            f"this guest belongs to the event loop of thread {self._thread}, and this is another",
            "use it in that loop, as with asyncio.run_coroutine_threadsafe",
        )


class OwnTask(Generic[T]):
    """An async context that is entered and left by a task of its own.

    A loop that ends cancels its tasks before it closes generators that are still open, all of them
    at once.  A context of many layers is left in order by the first, and not by the second.  What
    is raised inside is not told to the context.

    :param abandon: called when it is left in another loop, where nothing of it can be awaited, or
        its own is found to be closed.
    """

    def __init__(
        self,
        context: contextlib.AbstractAsyncContextManager[T],
        name: str,
        abandon: Callable[[T], None],
    ) -> None:
        self._context = context
        self._name = name
        self._abandon = abandon

    async def __aenter__(self) -> T:
        """Enter the context in a new task; what it raises is raised here."""
        for other in list(_held):
            other._abandon_if_ended()
        self._own = OwnLoop()
        self._leave = asyncio.Event()
        self._entered: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._hold(), name=self._name)
        try:
            return await asyncio.shield(self._entered)
        except BaseException:
            self._task.cancel()
            await self._ended()
            if not self._entered.cancelled():
                self._entered.exception()  # nobody else will ask, which asyncio complains about
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Have the task leave the context.  Cancelling this cancels that, once."""
        try:
            self._own.check()
        except UsageError:
            self._abandon(self._entered.result())
            raise
        self._leave.set()
        await self._ended()
        if not self._task.cancelled():
            self._task.result()

    def _abandon_if_ended(self) -> None:
        if self._own.has_ended and self._entered.done() and self._entered.exception() is None:
            self._abandon(self._entered.result())

    async def _hold(self) -> None:
        _held.add(self)
        try:
            async with self._context as value:
                self._entered.set_result(value)
                await self._leave.wait()
            _held.discard(self)
        except BaseException as error:
            _held.discard(self)
            if self._entered.done():
                raise
            if isinstance(error, asyncio.CancelledError):
                self._entered.cancel()
                raise
            self._entered.set_exception(error)

    async def _ended(self) -> None:
        cancelled: asyncio.CancelledError | None = None
        while not self._task.done():
            try:
                await asyncio.wait({self._task})
            except asyncio.CancelledError as error:
                cancelled = error
                self._task.cancel()
        if cancelled is not None:
            raise cancelled


# What was begun in a loop that is closed cannot be finished, and Python complains about it when it
# is thrown away: so it is kept.
_held: set[OwnTask[Any]] = set()


def close_unawaited(work: Awaitable[object]) -> None:
    """Throw away what will not be awaited."""
    if asyncio.iscoroutine(work):
        work.close()
