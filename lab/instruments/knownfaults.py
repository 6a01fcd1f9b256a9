"""A known answer for the fault log: so many write faults, made from outside while the guest runs.

The lab writes to pages of a working set that the guest leaves alone, with `process_vm_writev` and
the word that is there already, so that nothing changes.  To the kernel each is the first write to a
protected page: the writing thread waits until the engine has saved and released it, as a vCPU
would.  The kernel names the thread with every fault, so the log says which faults these are.

Each page lies in 2 MiB of its own, so that no engine releases one because of another.  A page that
the sweep has released before it is written to makes no fault.  So the pages are taken from the end
of RAM, where a sweep comes last, and are written to at once when the guest goes on; the answer is
exact as long as the sweep has more than a moment's work before it gets there.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from lab.column import Metric
from lab.errors import GuestError
from lab.guests.protocol import PAGE_BYTES, PAGE_MAGIC, PAGE_WORDS, WORD_MAGIC
from lab.host.memory import write_process
from lab.instruments.instrument import Found, Happened, Instrument, Moment, Step, Taken, Watched
from lab.journal import meanwhile

METRICS = (
    Metric(
        "known_faults_logged",
        "int64",
        "1",
        "write faults in the log that the lab itself made, to compare with the `known_faults` of "
        "the scenario; null when none were asked for",
        title="known faults logged",
    ),
)


APART_BYTES = 2 << 20
"""What an engine releases at a time at most because of one fault, by default."""


RESUME_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class _Page:
    block: str
    offset: int
    address: int
    word: bytes


class KnownFaults:
    """Pages of one guest that are to be written to.  Made by `find`."""

    def __init__(self, pid: int, pages: Sequence[_Page]) -> None:
        self._pid = pid
        self._pages = pages
        self.tid = 0

    @classmethod
    async def find(cls, vm: Watched, count: int) -> KnownFaults:
        """Choose `count` pages of the guest's working set.

        :raise GuestError: the working set does not reach over so many pieces of `APART_BYTES`.
        """
        magic = np.uint64(PAGE_MAGIC ^ vm.ready.nonce)
        found: list[_Page] = []
        for block in await vm.ram_blocks():
            # From the end, which a sweep that goes through the block in order comes to last.
            for start in range(block.used_bytes - APART_BYTES, -1, -APART_BYTES):
                if len(found) == count:
                    break
                octets = vm.read_host(block.host_address + start, APART_BYTES)
                rows = np.frombuffer(octets, "<u8").reshape(-1, PAGE_WORDS)
                hits = np.flatnonzero(rows[:, WORD_MAGIC] == magic)
                if len(hits):
                    # In the middle, away from pieces of another place.
                    hit = int(hits[len(hits) // 2])
                    offset = start + hit * PAGE_BYTES
                    found.append(
                        _Page(
                            block=block.name,
                            offset=offset,
                            address=block.host_address + offset,
                            word=rows[hit, WORD_MAGIC].tobytes(),
                        )
                    )
        if len(found) < count:
            raise GuestError(
                f"the working set reaches over {len(found)} pieces of {APART_BYTES >> 20} MiB, and "
                f"{count} known faults need as many",
                "ask for fewer known_faults, or give the guest a larger wss_mib",
            )
        return cls(vm.pid, found)

    @contextlib.asynccontextmanager
    async def written_on_resume(self, vm: Watched) -> AsyncIterator[None]:
        """Write to each page once, as soon as the guest goes on after its next pause; the context
        ends when that is done.  Nothing is written when the context is left by an exception before.

        :raise HostError: when this process may not write to that one's memory.
        :raise QmpError: when the guest does not pause and go on.
        """
        since = len(vm.qmp.events)

        async def write() -> None:
            await vm.qmp.wait_event(_is_resume, since=since, timeout_s=RESUME_TIMEOUT_S)
            # A thread of its own: it waits for each fault, and so would everything else.
            await asyncio.to_thread(self._write)

        async with meanwhile(write(), "known faults") as writing:
            yield
            await writing

    def _write(self) -> None:
        self.tid = threading.get_native_id()
        for page in self._pages:
            write_process(self._pid, page.address, page.word)

    def logged(self, faults: pd.DataFrame) -> int:
        """How many faults of a log are these: of the thread that wrote.  A fault of it on another
        page, or two on one page, are counted all the same, so that nothing wrong looks right.
        """
        return int((faults["tid"] == self.tid).sum())

    def by_others(self, faults: pd.DataFrame) -> int:
        """How many faults of a log are on these pages and not of that thread: they would have to
        be the guest's, which is to leave them alone.
        """
        asked = {(page.block, page.offset) for page in self._pages}
        others = faults[faults["tid"] != self.tid]
        return sum(pair in asked for pair in zip(others["block"], others["offset"], strict=True))


def _is_resume(event: Happened) -> bool:
    return event.name == "RESUME"


class KnownFaultsInstrument(Instrument):
    """The fault log's known answer, compared with what it says."""

    title: ClassVar = "known faults"
    switch: ClassVar = "known_faults"
    metrics: ClassVar = METRICS

    known: KnownFaults

    @contextlib.asynccontextmanager
    async def attached(self) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as self._armed:
            yield

    def steps(self) -> Mapping[Moment, Step]:
        return {Moment.SETTLED: self._find, Moment.ARMED: self._arm}

    async def _find(self) -> None:
        self.known = await KnownFaults.find(self.vm, self.scenario.instruments.known_faults)

    async def _arm(self) -> None:
        await self._armed.enter_async_context(self.known.written_on_resume(self.vm))

    def found(self, taken: Taken) -> Found:
        if taken.faults is None:
            return Found()
        spoilt = self.known.by_others(taken.faults)
        warning = f"the guest wrote to {spoilt} of the pages of the known faults itself"
        return Found(
            figures={"known_faults_logged": self.known.logged(taken.faults)},
            warnings=[warning] if spoilt else [],
        )
