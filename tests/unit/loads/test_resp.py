"""The load on Redis and a server's bytes: what it sends, and how it reads what comes back, in
whatever pieces."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.errors import GuestError
from lab.loads.load import Operation, redis_load

Answer = Callable[[list[bytes], int], bytes | None]


async def read_command(reader: asyncio.StreamReader) -> list[bytes]:
    """One command, as the protocol wants it to the byte."""
    line = await reader.readline()
    if not line:
        raise EOFError
    assert line[:1] == b"*"
    words = []
    for _ in range(int(line[1:-2])):
        size = await reader.readline()
        assert size[:1] == b"$"
        assert size[-2:] == b"\r\n"
        words.append(await reader.readexactly(int(size[1:-2])))
        assert await reader.readexactly(2) == b"\r\n"
    return words


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


@contextlib.asynccontextmanager
async def server_of(talk: Talk) -> AsyncIterator[int]:
    """A server on a free port that does `talk` on each connection until that is closed."""
    tasks: set[asyncio.Task[None]] = set()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task: Any = asyncio.current_task()
        tasks.add(task)
        try:
            with contextlib.suppress(EOFError, ConnectionError):
                await talk(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    async with server:
        port: int = server.sockets[0].getsockname()[1]
        yield port
    # The load has closed all connections by now.
    await asyncio.gather(*tasks)


@contextlib.asynccontextmanager
async def scripted_server(answer: Answer, pieces: tuple[int, ...] = ()) -> AsyncIterator[int]:
    """A server of which `answer` says the bytes, for each command and how many the connection had
    before; None closes the connection.

    :param pieces: lengths of the pieces in which bytes are sent, one after the other.
    """

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        commands = 0
        while (said := answer(await read_command(reader), commands)) is not None:
            commands += 1
            for size in pieces:
                writer.write(said[:size])
                await writer.drain()
                # Let the other side read it before the next piece comes.
                await asyncio.sleep(0.0005)
                said = said[size:]
            writer.write(said)
            await writer.drain()

    async with server_of(talk) as port:
        yield port


def answers(*replies: bytes | None) -> Answer:
    """PONG, and then these, the last one again and again."""
    return lambda words, count: (
        b"+PONG\r\n" if words == [b"PING"] else replies[min(count, len(replies)) - 1]
    )


async def run(answer: Answer, operation: Operation = "SET", requests: int = 6) -> None:
    async with (
        scripted_server(answer) as port,
        redis_load(port=port, operation=operation, clients=2, keys=5, value_bytes=4) as load,
    ):
        await load.wait_requests(requests, 60)


@settings(max_examples=12)
@given(
    value=st.binary(max_size=40) | st.none(),
    pieces=st.lists(st.integers(1, 6), max_size=8).map(tuple),
)
def test_a_reply_may_come_in_any_pieces_and_hold_any_bytes(
    value: bytes | None, pieces: tuple[int, ...]
) -> None:
    reply = b"$-1\r\n" if value is None else b"$%d\r\n%b\r\n" % (len(value), value)

    async def scenario() -> None:
        async with (
            scripted_server(answers(reply), pieces) as port,
            redis_load(port=port, operation="GET", clients=2) as load,
        ):
            await load.wait_requests(6, 60)
            assert load.df().query("not censored")["ok"].all()

    asyncio.run(scenario())


async def test_requests_are_what_the_protocol_wants() -> None:
    seen: list[list[bytes]] = []

    def note(words: list[bytes], count: int) -> bytes:
        seen.append(words)
        return b"+PONG\r\n" if words == [b"PING"] else b"+OK\r\n"

    await run(note)
    assert seen[:2] == [[b"PING"], [b"PING"]]
    for words in seen[2:]:
        assert words[0] == b"SET"
        assert words[1] in [b"lab:key:%012d" % number for number in range(5)]
        assert len(words[2]) == 4
    assert len({words[2] for words in seen[2:]}) > 1


async def test_a_request_is_done_when_its_last_byte_is_there() -> None:
    async with (
        scripted_server(answers(b"$3\r\nabc\r\n", b"$3\r\nabc\r")) as port,
        redis_load(port=port, operation="GET", clients=1) as load,
    ):
        await load.wait_requests(1, 60)
        await asyncio.sleep(0.05)
        assert load.completed == 1
        assert load.df()["censored"].tolist() == [False, True]


@pytest.mark.parametrize("text", ["MISCONF Redis cannot write", "LOADING it reads", "X" * 1000])
async def test_an_error_is_counted_and_the_first_text_is_kept(text: str) -> None:
    # In the middle, with another one after it.
    server = answers(b"+OK\r\n", b"-" + text.encode() + b"\r\n", b"-ERR other\r\n", b"+OK\r\n")

    async def load_with_errors() -> None:
        async with (
            scripted_server(server) as port,
            redis_load(port=port, clients=1) as load,
        ):
            while load.completed < 6:
                await asyncio.sleep(0.01)
            assert load.refused == 2
            assert load.first_error == f"-{text}"[:255]
            assert load.df()["ok"].tolist()[:6] == [True, False, False, True, True, True]
            await load.wait_requests(1, 60)

    with pytest.raises(GuestError, match=f'refused 2 of .* first with "-{text[:40]}'):
        await load_with_errors()


@pytest.mark.parametrize("reply", [b"-LOADING it reads\r\n", b"-NOAUTH who are you\r\n"])
async def test_a_server_that_is_not_ready_says_so_itself(reply: bytes) -> None:
    with pytest.raises(GuestError, match=f'answers PING with "{reply.decode().strip()}"'):
        await run(lambda words, count: reply)


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b":1\r\n",
        b"*1\r\n$2\r\nOK\r\n",
        b"+OK\n",
        b"+OK\r\r\n",
        b"\r\n",
        b"$2\r\nOK\r\n",
    ],
)
async def test_what_is_no_reply_to_set_is_no_redis(reply: bytes) -> None:
    with pytest.raises(GuestError, match="what answers SET is no Redis"):
        await run(answers(reply))


@pytest.mark.parametrize(
    "reply", [b"+OK\r\n", b"$\r\n", b"$-2\r\n", b"$1x\r\n", b"$99999999999\r\n"]
)
async def test_what_is_no_reply_to_get_is_no_redis(reply: bytes) -> None:
    with pytest.raises(GuestError, match="what answers GET is no Redis"):
        await run(answers(reply), "GET")


async def test_a_value_longer_than_announced_is_found() -> None:
    with pytest.raises(GuestError, match="longer than it says"):
        await run(answers(b"$2\r\nabc\r\n"), "GET")


async def test_bytes_that_nobody_asked_for_are_found() -> None:
    with pytest.raises(GuestError, match=r"more than the reply to SET|nobody asked for"):
        await run(answers(b"+OK\r\n+OK\r\n"))


async def test_a_connection_that_is_closed_is_named_with_what_was_done_before() -> None:
    with pytest.raises(GuestError, match="the server closed the connection before it answered"):
        await run(lambda words, count: None)
    with pytest.raises(GuestError, match=r"(closed|reset) .*after \d requests"):
        await run(answers(b"+OK\r\n", b"+OK\r\n", None), requests=100)


async def test_a_server_that_does_not_answer_is_waited_for_within_a_bound() -> None:
    async with scripted_server(lambda words, count: b"") as port:
        with pytest.raises(GuestError, match=r"0 of 3 connections answered a PING within 0\.2 s"):
            async with redis_load(port=port, clients=3, ready_s=0.2):
                pass


async def test_connections_are_made_one_after_the_other() -> None:
    # QEMU's user network takes one at a time, and leaves others hanging.
    waiting: list[int] = []
    answered = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal answered
        waiting.append(len(waiting) - answered)
        while await read_command(reader):
            await asyncio.sleep(0.002)
            answered += answered < 20
            writer.write(b"+OK\r\n")

    async with server_of(talk) as port, redis_load(port=port, clients=20) as load:
        await load.wait_requests(20, 60)
    assert waiting == [0] * 20
