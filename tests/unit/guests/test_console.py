"""Records are picked out of whatever else the guest prints."""

import asyncio
import socket

import pytest

from lab.errors import GuestError
from lab.guests.console import attached
from lab.guests.protocol import Record

BOUND_S = 60.0


def _is_error(record: Record) -> bool:
    return record.kind == "error"


async def test_records_are_found_between_other_lines_and_over_split_writes() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        async with attached(ours) as console:
            theirs.sendall(b"noise\r\nLAB1 hello version=1\r\nLAB1 er")
            waiting = asyncio.create_task(console.wait_record(_is_error, timeout_s=BOUND_S))
            await asyncio.sleep(0)
            theirs.sendall(b"ror what=wss\n")
            record = await waiting
            assert record.fields["what"] == "wss"
            assert [r.kind for r in console.records] == ["hello", "error"]
            assert console.text == "noise\nLAB1 hello version=1\nLAB1 error what=wss\n"
            assert console.tail(1) == "LAB1 error what=wss"


async def test_a_console_that_closes_ends_the_wait() -> None:
    ours, theirs = socket.socketpair()
    async with attached(ours) as console:
        theirs.close()
        with pytest.raises(GuestError, match="closed"):
            await console.wait_record(_is_error, timeout_s=BOUND_S)


async def test_a_silent_guest_is_an_error_that_quotes_its_last_line() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        async with attached(ours) as console:
            theirs.sendall(b"LAB1 hello version=1\n")
            await console.wait_record(lambda r: r.kind == "hello", timeout_s=BOUND_S)
            with pytest.raises(GuestError, match="LAB1 hello"):
                await console.wait_record(_is_error, timeout_s=0.05)


async def test_a_mangled_record_is_reported_to_whoever_waits() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        async with attached(ours) as console:
            theirs.sendall(b"LAB1 rea#y\n")
            with pytest.raises(GuestError, match="not a record"):
                await console.wait_record(_is_error, timeout_s=BOUND_S)


async def test_a_record_that_a_reset_cut_short_is_not_waited_for_in_vain() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        async with attached(ours) as console:
            theirs.sendall(b"LAB1 rea")
            console.restarted()
            theirs.sendall(b"LAB1 hello version=1\nLAB1 error what=wss\n")
            record = await console.wait_record(_is_error, timeout_s=BOUND_S)
            assert record.fields == {"what": "wss"}
            # From then on nothing is skipped any more.
            theirs.sendall(b"LAB1 rea#y\n")
            with pytest.raises(GuestError, match="not a record"):
                await console.wait_record(_is_error, since=len(console.records), timeout_s=BOUND_S)
