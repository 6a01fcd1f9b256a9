"""A viewer of the guest's screen: the smallest client of RFB, the protocol of VNC.

It asks for what has changed on the screen, again and again, as a person's viewer would.  That has
QEMU track which pages of the screen's memory are written, and read them, while a snapshot runs.
Nothing is drawn: pixels are counted and thrown away.
"""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from pathlib import Path

from lab.errors import GuestError
from lab.journal import Journal, read_meanwhile

CONNECT_TIMEOUT_S = 30.0
"""QEMU's main thread answers, and a busy one may take its time."""

_VERSION = b"RFB 003.008\n"
_SECURITY_NONE = 1
_RAW, _DESKTOP_SIZE = 0, -223
_UPDATE, _COLOURS, _BELL, _CUT_TEXT = range(4)


class Viewer:
    """What has been seen of the screen so far.  Made by `viewing`.

    `updates` are answers that QEMU gave.  The first shows all of the screen, and a later one comes
    only when something has changed.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._pixels_shown = Journal[int]()
        self._bytes_per_pixel = 4
        self.width = 0
        self.height = 0

    @property
    def updates(self) -> int:
        """Answers that QEMU gave."""
        return len(self._pixels_shown.entries)

    @property
    def pixels(self) -> int:
        """What was in them, all together."""
        return sum(self._pixels_shown.entries)

    async def wait_updates(self, count: int, *, timeout_s: float) -> None:
        """Wait until there have been `count` updates.

        :raise GuestError: when QEMU ends the connection first, or the time is over.
        """
        try:
            await self._pixels_shown.first(lambda _: True, since=count - 1, timeout_s=timeout_s)
        except TimeoutError as error:
            raise GuestError(
                f"{self.updates} updates of the screen in {timeout_s:g} s instead of {count}",
                "see whether the guest draws on it",
            ) from error

    async def _take(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, await self._reader.readexactly(struct.calcsize(layout)))

    async def _greet(self) -> None:
        await self._reader.readexactly(len(_VERSION))
        self._writer.write(_VERSION)
        (count,) = await self._take(">B")
        if _SECURITY_NONE not in await self._reader.readexactly(count):
            raise GuestError("the screen is not open to everybody who can reach its socket")
        self._writer.write(bytes([_SECURITY_NONE]))
        (refused,) = await self._take(">I")
        if refused:
            raise GuestError("QEMU refused to show the screen")
        shared = 1
        self._writer.write(bytes([shared]))
        self.width, self.height = await self._take(">HH")
        bits_per_pixel, *_ = await self._take(">BBBBHHHBBB3x")
        self._bytes_per_pixel = bits_per_pixel // 8
        (length,) = await self._take(">I")
        await self._reader.readexactly(length)  # the screen's name
        self._writer.write(struct.pack(">BxHii", 2, 2, _RAW, _DESKTOP_SIZE))

    def _ask(self, *, all_of_it: bool) -> None:
        request = struct.pack(">BBHHHH", 3, not all_of_it, 0, 0, self.width, self.height)
        self._writer.write(request)

    async def _view(self) -> None:
        try:
            self._ask(all_of_it=True)
            while True:
                (kind,) = await self._take(">B")
                if kind == _UPDATE:
                    resized = await self._read_update()
                    self._ask(all_of_it=resized)
                elif kind == _COLOURS:
                    _, count = await self._take(">xHH")
                    await self._reader.readexactly(6 * count)
                elif kind == _CUT_TEXT:
                    (length,) = await self._take(">3xI")
                    await self._reader.readexactly(length)
                elif kind != _BELL:
                    raise GuestError(f"QEMU sent message {kind}, which RFB does not know")
        except (OSError, EOFError, GuestError) as error:
            self._pixels_shown.fail(GuestError(f"the screen's connection ended: {error!r}"))

    async def _read_update(self) -> bool:
        """Read one update; return whether the screen has another size now."""
        resized, pixels = False, 0
        (rectangles,) = await self._take(">xH")
        for _ in range(rectangles):
            _, _, width, height, encoding = await self._take(">HHHHi")
            if encoding == _DESKTOP_SIZE:
                self.width, self.height, resized = width, height, True
            elif encoding == _RAW:
                await self._reader.readexactly(width * height * self._bytes_per_pixel)
                pixels += width * height
            else:
                raise GuestError(f"QEMU sent encoding {encoding}, which was not asked for")
        self._pixels_shown.add(pixels)
        return resized


@contextlib.asynccontextmanager
async def viewing(path: Path) -> AsyncIterator[Viewer]:
    """Watch the screen that QEMU serves on the UNIX socket `path`, as long as the context lasts.

    :raise GuestError: when there is no such screen.
    """
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(path, limit=1 << 22)
            viewer = Viewer(reader, writer)
            await viewer._greet()
    except (OSError, EOFError, TimeoutError) as error:
        raise GuestError(
            f"no screen on {path.name}: {error!r}", "boot the machine with vnc=True"
        ) from error
    async with read_meanwhile(viewer._view(), writer, "viewer"):
        yield viewer
