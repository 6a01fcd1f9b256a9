"""QEMU's monitor as an async context: commands with timeouts, and every event kept.

A thin layer over `qemu.qmp`, which has no timeouts of its own and whose event listeners fall
silent when the link dies.  Here a lost link ends every wait with a `QmpError`.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from qemu.qmp import ExecInterruptedError, ExecuteError, QMPClient, QMPError, Runstate, StateError

from lab.errors import QmpError
from lab.journal import Journal

_Json = Mapping[str, Any]

log = logging.getLogger(__name__)

COMMAND_TIMEOUT_S = 30.0
"""QEMU answers in microseconds, unless its main thread is held up: by a device, a slow disk or a
host that swaps.  A guest of many GiB makes a few commands take seconds."""

LINK_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Event:
    """One QMP event.

    `time_us` is QEMU's own stamp, CLOCK_REALTIME in microseconds.
    """

    name: str
    data: Mapping[str, Any]
    time_us: int


class Qmp:
    """A live monitor.  Made by `connected`; not shared between threads."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client
        self._journal = Journal[Event]()
        self._lost = False

    @property
    def events(self) -> list[Event]:
        """Every event since the link was made, oldest first."""
        return self._journal.entries

    @property
    def is_lost(self) -> bool:
        """Whether QEMU closed the link."""
        return self._lost

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float = COMMAND_TIMEOUT_S,
        out_of_band: bool = False,
    ) -> Any:
        """Run one command and return what QEMU returns.

        :param out_of_band: have it run at once, even if QEMU's main thread hangs; few commands can.
        :raise QmpError: when QEMU refuses the command (the text is QEMU's), does not answer in
            time or is gone.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command, arguments, oob=out_of_band)
        except ExecuteError as error:
            raise QmpError(str(error)) from error
        except TimeoutError as error:
            raise QmpError(f"QEMU did not answer {command} within {timeout_s:g} s") from error
        except (ExecInterruptedError, StateError, EOFError, OSError) as error:
            self._lose()
            raise QmpError(f"QEMU went away before it answered {command}") from error

    async def hmp(self, command: str, *, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Run one human monitor command and return its text.

        QEMU reports errors of such commands in that text only.
        """
        text = await self.execute(
            "human-monitor-command", {"command-line": command}, timeout_s=timeout_s
        )
        return str(text)

    async def send_descriptor(self, name: str, descriptor: int) -> None:
        """Give QEMU a duplicate of a descriptor, under a name by which a command takes it.

        :raise QmpError: as `execute`.
        """
        self._send(descriptor)
        await self.execute("getfd", {"fdname": name})

    @contextlib.asynccontextmanager
    async def lent(self, descriptor: int) -> AsyncIterator[Path]:
        """Give QEMU an open file, and the path by which it opens just that while this lasts.

        It opens duplicates, as often as it likes; all have the position of `descriptor`.  When
        this is left by an error QEMU keeps it: then it is about to end.

        :raise QmpError: as `execute`.
        """
        self._send(descriptor)
        given = await self.execute("add-fd")
        yield Path(f"/dev/fdset/{given['fdset-id']}")
        await self.execute("remove-fd", {"fdset-id": given["fdset-id"]})

    def _send(self, descriptor: int) -> None:
        try:
            self._client.send_fd_scm(descriptor)
        except OSError as error:
            raise QmpError(f"QEMU cannot be sent a descriptor: {error.strerror}") from error

    async def wait_event(
        self, wanted: Callable[[Event], bool], *, since: int = 0, timeout_s: float
    ) -> Event:
        """Return the first event that `wanted` accepts among `events[since:]`, present or to come.

        Take `since = len(qmp.events)` before the command that causes the event.

        :raise QmpError: when the link is lost first, or the time is over.
        """
        try:
            return await self._journal.first(wanted, since=since, timeout_s=timeout_s)
        except TimeoutError as error:
            raise QmpError(f"the awaited event did not come within {timeout_s:g} s") from error

    async def _keep_events(self) -> None:
        async for message in self._client.events:
            data, stamp = cast(_Json, message.get("data", {})), cast(_Json, message["timestamp"])
            event = Event(
                name=str(message["event"]),
                data=data,
                time_us=stamp["seconds"] * 1_000_000 + stamp["microseconds"],
            )
            log.debug("event %s %s", event.name, event.data)
            self._journal.add(event)

    async def _watch_link(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        self._lose()

    def _lose(self) -> None:
        self._lost = True
        self._journal.fail(QmpError("QEMU went away while an event was awaited"))


@contextlib.asynccontextmanager
async def connected(sock: socket.socket) -> AsyncIterator[Qmp]:
    """Speak QMP over `sock`, one end of a connected pair; the context closes it.

    :raise QmpError: when there is no QEMU at the other end.
    """
    client = QMPClient("lab")
    # The library logs what it also raises; the caller decides what is worth a line.
    client.logger.setLevel(logging.CRITICAL)
    try:
        async with asyncio.timeout(LINK_TIMEOUT_S):
            await client.connect(sock)
    except (QMPError, OSError, EOFError, TimeoutError) as error:
        sock.close()
        raise QmpError("QEMU did not greet on its monitor") from error
    qmp = Qmp(client)
    tasks = [
        asyncio.create_task(qmp._keep_events(), name="QMP events"),
        asyncio.create_task(qmp._watch_link(), name="QMP link"),
    ]
    try:
        yield qmp
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # EOFError is how the library reports that QEMU has quit, which is no news here.
        with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
            async with asyncio.timeout(LINK_TIMEOUT_S):
                await client.disconnect()
