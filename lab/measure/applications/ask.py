"""Ask a Redis server for a few things, beside the load: settings, its data set, its own BGSAVE."""

from __future__ import annotations

import asyncio
import contextlib
import random
import string
from collections.abc import AsyncIterator

from lab.errors import GuestError, GuestSilentError

ANSWER_S = 60.0
FILL_AT_ONCE = 2_000
# The keys of lab/loads/redis.c, in one command, as each costs a guest under TCG many times what it
# does elsewhere.  A value is one text turned round by its number, so that values are not alike.
_FILL = """
local text, n, pairs = ARGV[3], #ARGV[3], {}
for i = tonumber(ARGV[1]), tonumber(ARGV[2]) do
    local k = i % n
    pairs[#pairs + 1] = string.format('lab:key:%012d', i)
    pairs[#pairs + 1] = text:sub(k + 1) .. text:sub(1, k)
end
redis.call('MSET', unpack(pairs))
return tonumber(ARGV[2])
"""

Reply = str | int | list["Reply"] | None


class Redis:
    """One connection.  Made by `connected_redis`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ask(self, *words: object, timeout_s: float = ANSWER_S) -> Reply:
        """Send one command and return its reply.

        :raise GuestError: the server refuses it, or is gone.
        :raise GuestSilentError: no reply in time.
        """
        parts = [str(word).encode() for word in words]
        text = b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts)
        try:
            async with asyncio.timeout(timeout_s):
                self._writer.write(text)
                await self._writer.drain()
                return await self._reply()
        except TimeoutError as error:
            raise GuestSilentError(
                f"Redis did not answer {words[0]} within {timeout_s:g} s"
            ) from error
        except (OSError, EOFError, ValueError) as error:
            raise GuestError(f"Redis went away when it was asked {words[0]}") from error

    async def _reply(self) -> Reply:
        line = (await self._reader.readuntil(b"\r\n"))[:-2].decode()
        kind, rest = line[:1], line[1:]
        if kind == "-":
            raise GuestError(f"Redis refuses: {rest}")
        if kind == "$":
            if int(rest) < 0:
                return None
            return (await self._reader.readexactly(int(rest) + 2))[:-2].decode(errors="replace")
        if kind == "*":
            return [await self._reply() for _ in range(int(rest))]
        return int(rest) if kind == ":" else rest

    async def persistence(self) -> dict[str, str]:
        """What the server says of its writing to disk (`INFO persistence`)."""
        told = str(await self.ask("INFO", "persistence"))
        pairs = (line.partition(":") for line in told.splitlines())
        return {name: value for name, colon, value in pairs if colon}

    async def fill(self, keys: int, value_bytes: int) -> None:
        """Write every key that the load asks for, by scripts of a few thousand keys."""
        text = "".join(random.Random(1).choices(string.ascii_letters, k=value_bytes))
        for first in range(0, keys, FILL_AT_ONCE):
            last = min(first + FILL_AT_ONCE, keys) - 1
            await self.ask("EVAL", _FILL, 0, first, last, text)


@contextlib.asynccontextmanager
async def connected_redis(port: int) -> AsyncIterator[Redis]:
    """Connect to the server behind a port of this host's loopback.

    :raise GuestError: nothing listens there.
    """
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError as error:
        raise GuestError(f"nothing listens at port {port}: {error.strerror}") from error
    try:
        yield Redis(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def wait_for_redis(port: int, timeout_s: float) -> None:
    """Wait until the server answers.

    :raise GuestSilentError: when it does not in time.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout_s
    while True:
        with contextlib.suppress(GuestError, GuestSilentError):
            async with connected_redis(port) as redis:
                await redis.ask("PING", timeout_s=10)
                return
        if loop.time() > end:
            raise GuestSilentError(f"Redis does not answer at port {port} after {timeout_s:g} s")
        await asyncio.sleep(0.5)
