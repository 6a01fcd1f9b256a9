"""A monitor that refuses, is silent or goes away ends every wait with one line."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from lab.errors import QmpError
from lab.vm.qmp import Event, Qmp, connected

Reply = dict[str, Any] | None
GREETING = {"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}}, "capabilities": []}}


class FakeQemu:
    """The other end: answers each command by what `answer` returns, None for silence."""

    def __init__(self, sock: socket.socket, answer: Callable[[str], Reply]) -> None:
        self._sock = sock
        self._answer = answer
        self._writer: asyncio.StreamWriter | None = None

    async def serve(self) -> None:
        reader, self._writer = await asyncio.open_connection(sock=self._sock)
        self.send(GREETING)
        decoder, text = json.JSONDecoder(), ""
        while data := await reader.read(4096):
            text += data.decode()
            # The client does not end its messages with a newline.
            while text := text.lstrip():
                try:
                    message, end = decoder.raw_decode(text)
                except ValueError:
                    break
                text = text[end:]
                command = message["execute"]
                reply = {"return": {}} if command == "qmp_capabilities" else self._answer(command)
                if reply is not None:
                    # The negotiation carries no id.
                    self.send(reply | {key: message[key] for key in ("id",) if key in message})

    def send(self, message: dict[str, Any]) -> None:
        assert self._writer is not None
        self._writer.write(json.dumps(message).encode() + b"\r\n")

    def event(self, name: str, seconds: int = 5, micros: int = 7, **data: Any) -> None:
        stamp = {"seconds": seconds, "microseconds": micros}
        self.send({"event": name, "data": data, "timestamp": stamp})

    def hang_up(self) -> None:
        assert self._writer is not None
        self._writer.close()


@contextlib.asynccontextmanager
async def fake_qemu(
    answer: Callable[[str], Reply] = lambda command: {"return": {"command": command}},
) -> AsyncIterator[tuple[Qmp, FakeQemu]]:
    ours, theirs = socket.socketpair()
    fake = FakeQemu(theirs, answer)
    server = asyncio.create_task(fake.serve())
    try:
        async with connected(ours) as qmp:
            yield qmp, fake
    finally:
        server.cancel()
        await asyncio.gather(server, return_exceptions=True)
        fake.hang_up()


async def test_a_command_returns_what_qemu_returns() -> None:
    async with fake_qemu() as (qmp, _):
        assert await qmp.execute("query-status") == {"command": "query-status"}


async def test_a_refusal_is_an_error_with_qemus_words() -> None:
    refusal = {"error": {"class": "GenericError", "desc": "no such thing"}}
    async with fake_qemu(lambda command: refusal) as (qmp, _):
        with pytest.raises(QmpError, match="no such thing"):
            await qmp.execute("query-status")


async def test_silence_ends_after_the_timeout_and_the_link_still_works() -> None:
    async with fake_qemu(lambda c: None if c == "stop" else {"return": 1}) as (qmp, _):
        with pytest.raises(QmpError, match="did not answer stop"):
            await qmp.execute("stop", timeout_s=0.05)
        assert await qmp.execute("query-status") == 1


async def test_a_link_that_is_lost_ends_a_command() -> None:
    async with fake_qemu(lambda command: None) as (qmp, fake):
        waiting = asyncio.create_task(qmp.execute("stop"))
        await asyncio.sleep(0)
        fake.hang_up()
        with pytest.raises(QmpError, match="went away"):
            await waiting


async def test_a_link_that_is_lost_ends_the_wait_for_an_event() -> None:
    async with fake_qemu() as (qmp, fake):
        waiting = asyncio.create_task(qmp.wait_event(lambda event: True, timeout_s=60))
        await asyncio.sleep(0)
        fake.hang_up()
        with pytest.raises(QmpError, match="went away"):
            await waiting
        assert qmp.is_lost


async def test_events_are_kept_from_the_start_and_found_by_place() -> None:
    async with fake_qemu() as (qmp, fake):
        fake.event("STOP")
        fake.event("RESUME", reason="x")
        resume = await qmp.wait_event(lambda e: e.name == "RESUME", timeout_s=60)
        assert [event.name for event in qmp.events] == ["STOP", "RESUME"]
        assert (resume.time_us, resume.data) == (5_000_007, {"reason": "x"})
        # An event that was there before `since` does not count.
        fake.event("STOP", seconds=6)
        later = await qmp.wait_event(lambda e: e.name == "STOP", since=2, timeout_s=60)
        assert later.time_us == 6_000_007


async def test_an_event_that_does_not_come_is_an_error() -> None:
    async with fake_qemu() as (qmp, _):
        with pytest.raises(QmpError, match="did not come"):
            await qmp.wait_event(_never, timeout_s=0.05)


async def test_nobody_at_the_other_end_is_an_error() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(QmpError, match="did not greet"):
        async with connected(ours):
            pass
    assert ours.fileno() == -1


async def test_cancelling_a_command_is_not_swallowed() -> None:
    async with fake_qemu(lambda command: None) as (qmp, _):
        waiting = asyncio.create_task(qmp.execute("stop"))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


def _never(event: Event) -> bool:
    return False
