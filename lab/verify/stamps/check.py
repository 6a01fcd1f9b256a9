"""Are a page of memory and the disks of one instant?  Pure: bytes in, findings out.

The guest (`stamps.c`) has one vCPU and one thread.  In round *k* it stores *k* in its page, and
then writes *k* to each disk, one after the other in a fixed order.  It goes on to the next disk,
and after the last one to the next round, when the write has returned; and a write returns when the
device has said that it is done.  For each disk the page has `begun`, stored before the write, and
`known`, stored after it.

At any instant, then, with the page and the disks as they were at that instant:

1. of each disk, `known <= newest <= begun`, where `newest` is the highest round that is on it;
2. each of its blocks has the last round up to `known` that belongs there, or one of those after it
   and up to `begun`: nothing that was written before is missing, and nothing is from later;
3. with writes past the guest's page cache, `k - 1 <= newest(last disk) <= ... <= newest(first
   disk) <= k`, where *k* is the round that is in memory, and of all disks together at most one has
   a write between `begun` and `known`.

This is exact, and no matter of luck.  1 and 3 follow from the order of the program, if two things
hold: an instant of the memory is one between two instructions of the vCPU, and no write of the
guest is on a disk that it had not begun by then.  The first is what a snapshot of memory is.  For
the second QEMU completes the requests that the guest has begun (it drains the block layer) when it
stops the vCPU, before the disks are switched; so a write in flight is on the frozen layer, and its
completion is in the state of the device, where the restored guest finds it.  Whether that write
counts as done or not is all that is left open, and that is why `newest` may have either value then.

A snapshot whose disks are of a later time breaks 1 upwards, as soon as the guest has written
another round in between; one whose disks are of an earlier time, or that lacks a write, breaks 1 or
2 downwards; disks that are of different instants break one of them for one disk.

In the mode `cached` the guest writes through its page cache, and calls fsync after every so many
rounds: `known` is the round of the last fsync, and 3 does not hold.

Not shown: what a power cut of the host would leave.  The frozen layers are read through the host's
page cache, as any QEMU on this host would read them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from lab.errors import GuestError
from lab.guests.protocol import PAGE_BYTES, PAGE_WORDS

MAX_DISKS = 4
BLOCKS = 2048
"""Of a disk, from its beginning; round k is in block `k * STEP % BLOCKS`."""
STEP = 37
REGION_BYTES = BLOCKS * PAGE_BYTES

_PAGE_MAGIC = 0x31504D545342414C  # "LABSTMP1"
_BLOCK_MAGIC = 0x4B4C425342414C56
_BEGUN = 16
_KNOWN = 17
_STRIDE = 8
_BLOCK_REST = 3
_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1

U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class MemoryStamps:
    """The guest's page.

    :param round: the last one whose number it has stored.
    :param begun: of each disk, the last round that was begun to be written.
    :param known: of each disk, the last round that is known to be on it.
    :param errors: how many reads, writes and comparisons went wrong in the guest.
    """

    nonce: int
    round: int
    begun: tuple[int, ...]
    known: tuple[int, ...]
    errors: int

    @classmethod
    def decode(cls, page: bytes, *, is_still: bool = True) -> Self:
        """Read a page.

        :param is_still: the guest stood when it was read.  Otherwise words may be of different
            rounds.
        :raise GuestError: it is none, or of no instant: the two stores of the round do not belong
            together.
        """
        word = [int(value) for value in np.frombuffer(page, "<u8")]
        if len(word) != PAGE_WORDS or word[0] != _PAGE_MAGIC:
            raise GuestError("no page of stamps there")
        _, nonce, disks, check, stamp, errors = word[:6]
        if not 1 <= disks <= MAX_DISKS:
            raise GuestError(f"a page of stamps of {disks} disks")
        # The check of a round is stored just before its number.
        if is_still and check not in (_mix64(nonce ^ stamp), _mix64(nonce ^ (stamp + 1))):
            raise GuestError(
                f"the page of stamps is of no instant: round {stamp}, check {check:#x}"
            )
        at = [_STRIDE * disk for disk in range(disks)]
        return cls(
            nonce=nonce,
            round=stamp,
            begun=tuple(word[_BEGUN + offset] for offset in at),
            known=tuple(word[_KNOWN + offset] for offset in at),
            errors=errors,
        )


@dataclass(frozen=True, kw_only=True)
class DiskStamps:
    """What the blocks of one disk say.

    :param disk: its number in the guest's order; None where no block names one.
    :param rounds: of each block, 0 where it was never written.
    :param bad: blocks that are neither empty nor what the guest wrote there.
    """

    disk: int | None
    rounds: U64
    bad: tuple[int, ...]

    @property
    def newest(self) -> int:
        """The last round on it."""
        return int(self.rounds.max())

    @classmethod
    def decode(cls, region: bytes, nonce: int) -> Self:
        """Read the beginning of a disk, `REGION_BYTES` of it.

        :param nonce: of the boot whose stamps are looked for; those of others are bad.
        """
        words = np.frombuffer(region, "<u8").reshape(BLOCKS, PAGE_WORDS)
        empty = ~words.any(axis=1)
        number, rounds = words[:, 1], words[:, 2]
        index = np.arange(_BLOCK_REST, PAGE_WORDS, dtype=np.uint64) - np.uint64(_BLOCK_REST - 1)
        seed = _mix(np.uint64(nonce) ^ _mix(rounds * np.uint64(MAX_DISKS) + number))
        right = (words[:, 0] == np.uint64(_BLOCK_MAGIC ^ nonce)) & (number < MAX_DISKS)
        right &= (words[:, _BLOCK_REST:] == seed[:, None] + index * np.uint64(_GAMMA)).all(axis=1)
        right &= rounds * np.uint64(STEP) % np.uint64(BLOCKS) == np.arange(BLOCKS, dtype=np.uint64)
        named = sorted(set(number[right].tolist()))
        if len(named) > 1:
            right &= number == np.uint64(named[0])
        return cls(
            disk=int(named[0]) if named else None,
            rounds=np.where(right, rounds, np.uint64(0)),
            bad=tuple(int(block) for block in np.flatnonzero(~right & ~empty)),
        )


def in_flight(memory: MemoryStamps) -> int:
    """How many writes were begun and not known to be done."""
    return sum(begun - known for begun, known in zip(memory.begun, memory.known, strict=True))


def findings(memory: MemoryStamps, disks: Sequence[DiskStamps], *, cached: bool) -> list[str]:
    """Say what shows that the memory and the disks are not of one instant; nothing if they are.

    :param disks: in any order; each names itself.
    :param cached: whether the guest writes through its page cache.
    """
    found = [
        f"a disk has {len(one.bad)} blocks that nobody wrote so, the first is {one.bad[0]}"
        for one in disks
        if one.bad
    ]
    by_number = {one.disk: one for one in disks}
    if set(by_number) != set(range(len(memory.begun))) or len(disks) != len(memory.begun):
        named = ", ".join("no disk" if one.disk is None else str(one.disk) for one in disks)
        return [*found, f"the blocks name {named}, of {len(memory.begun)} disks"]
    ordered = [by_number[number] for number in range(len(disks))]
    for number, one in enumerate(ordered):
        found += _of_disk(number, one, memory.begun[number], memory.known[number])
    if memory.errors:
        found.append(f"the guest had {memory.errors} errors of its disks itself")
    if not cached:
        chain = [memory.round, *(one.newest for one in ordered), memory.round - 1]
        if sorted(chain, reverse=True) != chain:
            found.append(
                f"memory is at round {memory.round}, and the disks at "
                f"{', '.join(str(one.newest) for one in ordered)}"
            )
        if in_flight(memory) > 1:
            found.append(
                f"{in_flight(memory)} writes in flight, of a guest that does one at a time"
            )
    return found


def _of_disk(number: int, disk: DiskStamps, begun: int, known: int) -> list[str]:
    found = []
    if not known <= disk.newest <= begun:
        found.append(f"disk {number} is at round {disk.newest}, and memory says {known} to {begun}")
    # Of each block the last round until `known` that belongs there.
    expected = np.zeros(BLOCKS, np.uint64)
    rounds = np.arange(max(1, known - BLOCKS + 1), known + 1, dtype=np.uint64)
    expected[rounds * np.uint64(STEP) % np.uint64(BLOCKS)] = rounds
    later = (disk.rounds > known) & (disk.rounds <= begun)
    wrong = np.flatnonzero((disk.rounds != expected) & ~later)
    if wrong.size:
        first = int(wrong[0])
        found.append(
            f"{wrong.size} blocks of disk {number} are of another round than they should be: block "
            f"{first} of {int(disk.rounds[first])} and not {int(expected[first])}"
        )
    return found


def _mix(z: U64) -> U64:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _mix64(value: int) -> int:
    return int(_mix(np.array([value & _MASK], dtype=np.uint64))[0])
