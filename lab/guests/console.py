"""The guest's serial console: its text, and the records in it."""

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator, Callable

from lab.errors import GuestError, GuestSilentError
from lab.guests.protocol import Record, parse_record
from lab.journal import Journal, read_meanwhile

MAX_TEXT_CHARS = 4 << 20
"""Text beyond this is dropped from the front: a guest in trouble can print for ever."""

_TEXT_POLL_S = 0.05


class Console:
    """What the guest printed.  Made by `attached`."""

    def __init__(self, writer: asyncio.StreamWriter | None = None) -> None:
        self._writer = writer
        self._journal = Journal[Record]()
        self._closed = False
        self._restarted = False
        self._partial = ""
        self._parts: list[str] = []
        self._chars = 0
        self.listener: Callable[[str], None] | None = None
        """Called with text as it comes, records included."""
        self.since_boot = 0
        """How many of the records are of boots that ended with a reset."""

    @property
    def records(self) -> list[Record]:
        """Every record since the console was attached, oldest first."""
        return self._journal.entries

    @property
    def text(self) -> str:
        """All text so far, including records (the last 4 Mi characters)."""
        return "".join(self._parts)

    def tail(self, lines: int = 10) -> str:
        """Return the last lines that are not empty."""
        return "\n".join([line for line in self.text.splitlines() if line.strip()][-lines:])

    async def type(self, line: str) -> None:
        """Type a line to the guest; lab/guests/README.md has the commands it knows.

        :raise GuestError: the console is closed.
        """
        await self.send(f"{line}\n".encode())

    async def send(self, keys: bytes) -> None:
        """Press keys.

        :raise GuestError: the console is closed.
        """
        if self._writer is None or self._closed:
            raise GuestError("the guest's console is closed", "see the console's text")
        self._writer.write(keys)
        await self._writer.drain()

    def restarted(self) -> None:
        """Take note that the guest is reset, which may cut a record short.

        Until the guest is ready again, or says why it is not, mangled records are skipped.
        """
        self._restarted = True
        self.since_boot = len(self.records)
        if not self._closed:
            self._journal.problem = None

    async def wait_record(
        self, wanted: Callable[[Record], bool], *, since: int = 0, timeout_s: float
    ) -> Record:
        """Return the first record that `wanted` accepts among `records[since:]` and those to come.

        :raise GuestSilentError: when the time is over.
        :raise GuestError: when the guest printed a mangled record or closed the console first.
        """
        try:
            return await self._journal.first(wanted, since=since, timeout_s=timeout_s)
        except TimeoutError as error:
            last = self.tail(1)
            raise GuestSilentError(
                f"the guest was silent for {timeout_s:g} s"
                + (f" after {last!r}" if last else " and printed nothing at all"),
                "give it more time, or look at the console's text",
            ) from error

    async def wait_text(self, pattern: str, *, since: int = 0, timeout_s: float = 120.0) -> str:
        """Return what the first match of a regular expression is in what the guest prints.

        :param since: look only behind so many characters of `text`.
        :raise GuestSilentError: when the time is over.
        :raise GuestError: when the guest closed the console first.
        """
        end = asyncio.get_running_loop().time() + timeout_s
        while True:
            is_last = self._closed
            if match := re.search(pattern, self.text[since:]):
                return match[0]
            if is_last:
                raise GuestError("the guest's console closed", "see the console's text")
            if asyncio.get_running_loop().time() > end:
                raise GuestSilentError(
                    f"the guest did not print {pattern!r} within {timeout_s:g} s",
                    "give it more time, or look at the console's text",
                )
            await asyncio.sleep(_TEXT_POLL_S)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            # A reset is QEMU dying; the end of the stream is the end either way.
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(65536):
                    self._take(data.decode("utf-8", "replace").replace("\r", ""))
        finally:
            self._closed = True
            closed = GuestError("the guest's console closed", "see the console's text")
            self._journal.fail(closed)

    def _take(self, text: str) -> None:
        if self.listener is not None:
            self.listener(text)
        self._parts.append(text)
        self._chars += len(text)
        while self._chars > MAX_TEXT_CHARS and len(self._parts) > 1:
            self._chars -= len(self._parts.pop(0))
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            try:
                record = parse_record(line)
            except GuestError as error:
                # Here nobody would see it; the next one who waits for a record does.
                if not self._restarted:
                    self._journal.fail(error)
                continue
            if record is not None:
                self._journal.add(record)
                if record.kind in ("ready", "error"):
                    self._restarted = False


@contextlib.asynccontextmanager
async def attached(sock: socket.socket) -> AsyncIterator[Console]:
    """Read the console from `sock`, one end of a connected pair; the context closes it."""
    reader, writer = await asyncio.open_connection(sock=sock)
    console = Console(writer)
    async with read_meanwhile(console._read(reader), writer, "console"):
        yield console
