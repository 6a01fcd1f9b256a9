"""The comparison of a page of stamps with the disks, on guests that are only a program here."""

import dataclasses
from collections.abc import Iterator, Sequence
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.errors import GuestError, UsageError
from lab.guests.protocol import PAGE_BYTES, PAGE_WORDS
from lab.scenario.methods import METHODS
from lab.verify.stamps import check
from lab.verify.stamps.check import BLOCKS, STEP, DiskStamps, MemoryStamps, findings
from lab.verify.stamps.guest import Case
from lab.verify.stamps.record import draw_case

NONCE = 0x0123456789ABCDEF


class Guest:
    """Does what `stamps.c` does, one store or write after the other."""

    def __init__(self, disks: int) -> None:
        self.memory = MemoryStamps(
            nonce=NONCE, round=0, begun=(0,) * disks, known=(0,) * disks, errors=0
        )
        self.disks: list[dict[int, int]] = [{} for _ in range(disks)]
        self._steps = self._program()

    def step(self) -> None:
        next(self._steps)

    def _program(self) -> Iterator[None]:
        disks = len(self.disks)
        round = 0
        while True:
            round += 1
            self.memory = dataclasses.replace(self.memory, round=round)
            yield
            for disk in range(disks):
                begun = (*self.memory.begun[:disk], round, *self.memory.begun[disk + 1 :])
                self.memory = dataclasses.replace(self.memory, begun=begun)
                yield
                self.disks[disk][round * STEP % BLOCKS] = round
                yield
                known = (*self.memory.known[:disk], round, *self.memory.known[disk + 1 :])
                self.memory = dataclasses.replace(self.memory, known=known)
                yield

    def stamps(self) -> list[DiskStamps]:
        return [stamps_of(number, blocks) for number, blocks in enumerate(self.disks)]


def stamps_of(number: int, blocks: dict[int, int]) -> DiskStamps:
    rounds = np.zeros(BLOCKS, np.uint64)
    for block, round in blocks.items():
        rounds[block] = round
    return DiskStamps(disk=number if blocks else None, rounds=rounds, bad=())


def after(steps: int, disks: int) -> Guest:
    guest = Guest(disks)
    # The first rounds are over when the guest is ready.
    for _ in range(2 * (1 + 3 * disks) + steps):
        guest.step()
    return guest


@given(st.integers(0, 300), st.integers(1, 4), st.randoms())
@settings(max_examples=60, deadline=None)
def test_every_instant_of_the_program_is_one(steps: int, disks: int, random: Random) -> None:
    guest = after(steps, disks)
    stamps = guest.stamps()
    random.shuffle(stamps)
    assert findings(guest.memory, stamps, cached=False) == []


@pytest.mark.parametrize("steps", [BLOCKS * 4, BLOCKS * 8 + 1])
def test_an_instant_is_one_when_all_blocks_were_written_before(steps: int) -> None:
    guest = after(steps, 1)
    assert findings(guest.memory, guest.stamps(), cached=False) == []


@given(st.integers(0, 100), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_a_disk_of_another_time_is_found(steps: int, disks: int, which: int) -> None:
    guest = after(steps, disks)
    memory, before = guest.memory, guest.stamps()
    # After one round the disk may be at the round whose write was in flight.
    for _ in range(2 * (1 + 3 * disks)):
        guest.step()
    stamps = list(before)
    # One of them is enough.
    stamps[which % disks] = guest.stamps()[which % disks]
    assert findings(memory, stamps, cached=False)
    # And the other way round: a memory of a later round than one disk.
    stamps = guest.stamps()
    stamps[which % disks] = before[which % disks]
    assert findings(guest.memory, stamps, cached=False)


@given(st.integers(0, 100), st.data())
@settings(max_examples=40, deadline=None)
def test_one_write_that_is_missing_is_found(steps: int, data: st.DataObject) -> None:
    guest = after(100 + steps, 2)
    lost = data.draw(st.integers(1, guest.memory.known[1]))
    del guest.disks[1][lost * STEP % BLOCKS]
    found = findings(guest.memory, guest.stamps(), cached=False)
    assert any("disk 1" in one for one in found)


def test_with_the_guests_page_cache_writes_after_the_last_fsync_may_be_missing() -> None:
    memory = MemoryStamps(nonce=NONCE, round=9, begun=(9, 9), known=(4, 4), errors=0)

    def disk(number: int, rounds: Sequence[int]) -> DiskStamps:
        return stamps_of(number, {round * STEP % BLOCKS: round for round in rounds})

    assert not findings(memory, [disk(0, range(1, 6)), disk(1, (1, 2, 3, 4, 9))], cached=True)
    assert findings(memory, [disk(0, range(1, 6)), disk(1, (1, 2, 4, 9))], cached=True)
    assert findings(memory, [disk(0, range(1, 6)), disk(1, range(1, 11))], cached=True)


def test_disks_that_name_themselves_alike_or_not_at_all_are_found() -> None:
    guest = after(0, 2)
    first, second = guest.stamps()
    assert findings(guest.memory, [first, first], cached=False)
    assert findings(guest.memory, [first], cached=False)
    empty = stamps_of(0, {})
    assert findings(guest.memory, [empty, second], cached=False)


def test_errors_that_the_guest_found_itself_are_found() -> None:
    guest = after(0, 1)
    memory = dataclasses.replace(guest.memory, errors=1)
    assert findings(memory, guest.stamps(), cached=False)


# Bytes


def page(round: int, check_round: int, *, nonce: int = NONCE) -> bytes:
    words = np.zeros(PAGE_WORDS, "<u8")
    words[:6] = (check._PAGE_MAGIC, nonce, 2, check._mix64(nonce ^ check_round), round, 3)
    words[16:18], words[24:26] = (round, round - 1), (round - 1, round - 1)
    return words.tobytes()


def test_a_page_says_what_the_guest_stored() -> None:
    for check_round in (7, 8):  # the check of a round is stored before it
        memory = MemoryStamps.decode(page(7, check_round))
        assert memory == MemoryStamps(nonce=NONCE, round=7, begun=(7, 6), known=(6, 6), errors=3)


def test_a_page_of_no_instant_is_refused() -> None:
    for content in (page(7, 6), page(7, 9), bytes(PAGE_BYTES)):
        with pytest.raises(GuestError):
            MemoryStamps.decode(content)
    assert MemoryStamps.decode(page(7, 9), is_still=False).round == 7


def block(disk: int, round: int) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    words = np.zeros(PAGE_WORDS, "<u8")
    words[:3] = (check._BLOCK_MAGIC ^ NONCE, disk, round)
    value = check._mix64(NONCE ^ check._mix64(round * check.MAX_DISKS + disk))
    for at in range(3, PAGE_WORDS):
        value = (value + check._GAMMA) % (1 << 64)
        words[at] = value
    return words


def region(disk: int, rounds: Sequence[int]) -> "np.ndarray[tuple[int, int], np.dtype[np.uint64]]":
    words = np.zeros((BLOCKS, PAGE_WORDS), "<u8")
    for round in rounds:
        words[round * STEP % BLOCKS] = block(disk, round)
    return words


def test_a_disk_says_what_was_written_to_it() -> None:
    rounds = range(1, 3000)
    found = DiskStamps.decode(region(2, rounds).tobytes(), NONCE)
    assert (found.disk, found.newest, found.bad) == (2, 2999, ())
    assert sorted(found.rounds.tolist()) == list(range(3000 - BLOCKS, 3000))
    empty = DiskStamps.decode(region(2, ()).tobytes(), NONCE)
    assert (empty.disk, empty.newest, empty.bad) == (None, 0, ())


@given(st.integers(0, PAGE_BYTES - 1), st.integers(1, 255))
@settings(max_examples=40, deadline=None)
def test_one_byte_of_a_block_that_differs_is_found(offset: int, bits: int) -> None:
    words = region(0, (1, 2, 3))
    at = 2 * STEP % BLOCKS
    words[at].view(np.uint8)[offset] ^= bits
    assert DiskStamps.decode(words.tobytes(), NONCE).bad == (at,)


def test_blocks_of_another_boot_or_another_place_are_bad() -> None:
    words = region(0, (1, 2))
    assert len(DiskStamps.decode(words.tobytes(), NONCE + 1).bad) == 2
    words[5] = block(0, 1)
    assert DiskStamps.decode(words.tobytes(), NONCE).bad == (5,)


# Cases


@given(st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_every_drawn_case_can_be_and_is_drawn_again(seed: int) -> None:
    case = draw_case(seed)
    assert case == draw_case(seed)
    assert case.method in METHODS
    assert not (case.iothread and case.disk == "ide")


#: A guest would hang in time, see patch 0023.
UPSTREAM = {"method": "background", "iothread": True}


def test_a_case_that_cannot_be_is_refused() -> None:
    for case in ({"disks": 0}, {"disks": 5}, {"disk": "none"}, {"cached": True}, UPSTREAM):
        with pytest.raises(UsageError):
            Case(**case)
