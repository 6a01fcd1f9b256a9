"""Which of the guest's operations were slow: each on its own, with its page.

A microguest that times its operations (`Workload.time_writes`) counts their durations like a Linux
guest, and notes those that took long in a ring in its memory, of which the host sees the last 4095
a writer.  So the wait of a write for its page can be laid beside the fault in QEMU's log: what the
guest waited longer than the handler took is the way there and back, through the kernel and, under
KVM, through its own tables.

What is measured: one operation as a whole, of five stores.  What is not: operations that were
faster than 4 us, and the pause.  An operation during which a guest was saved and restored took what
the two time stamp counters differ by, which is no duration.

What it costs: what timing operations costs, and for a slow one a few stores to pages of which each
faults once a snapshot.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pandas as pd

from lab.column import Column
from lab.errors import GuestError, UsageError
from lab.guests.protocol import PAGE_BYTES, SLOW_ENTRIES, SLOW_WORDS, U64, LatencyPage
from lab.instruments.instrument import Found, Instrument, Moment, Step, Taken, Watched
from lab.scenario.guests import GUEST_LIMITS
from lab.scenario.scenario import Scenario

TABLE = (
    Column(
        "thread",
        "int64",
        "",
        "index of the writer, which is that of its vCPU modulo the vCPUs",
    ),
    Column("op", "int64", "1", "which of the writer's operations it was, from 1"),
    Column("offset", "int64", "B", "offset of its page in the guest's main RAM block"),
    Column(
        "start_ns",
        "int64",
        "ns",
        "when it began, by the guest's clock, which has its own zero",
    ),
    Column("latency_ns", "int64", "ns", "how long it took, by the same clock"),
)
COLUMNS = tuple(column.name for column in TABLE)


async def read_slow_writes(vm: Watched) -> pd.DataFrame:
    """Return the slow operations that a guest remembers, oldest first.

    Columns: `thread` of the writer; `op` its how many-th operation, from 1; `offset` of the page in
    the guest's main RAM, in bytes; `start_ns` when it began, by the guest's clock, and `latency_ns`
    how long it took.  Only as good as the guest's clock, which is to a permille.

    The guest may run on.  If so many of its operations are slow that it writes over the oldest
    meanwhile, these may be torn.

    :raise UsageError: the guest does not time its operations, or does not note the slow ones.
    :raise GuestError: its clock has not ticked yet.
    """
    progress = await vm.progress_page()
    if not progress.latency_gpa:
        raise UsageError("the guest does not time its operations", "boot with time_writes=True")
    address = await vm.host_address(progress.latency_gpa)
    page = LatencyPage.decode(vm.read_host(address, PAGE_BYTES), progress.threads)
    if not page.set_gpa:
        raise UsageError("a Linux guest notes no single operations", 'boot with guest="micro"')
    if not page.ticks_per_ns:
        raise GuestError("the guest's clock has not ticked", "let it run for longer")
    parts = []
    for thread, gpa in enumerate(page.slow_gpas):
        octets = vm.read_host(await vm.host_address(gpa), SLOW_ENTRIES * SLOW_WORDS * 8)
        entries = slow_entries(octets)
        parts.append(
            pd.DataFrame(
                {
                    "thread": thread,
                    "op": entries[:, 3].astype(np.int64),
                    "offset": (page.set_gpa + entries[:, 2] * PAGE_BYTES).astype(np.int64),
                    "start_ns": _ns(entries[:, 0] - np.uint64(page.start_ticks), page.ticks_per_ns),
                    "latency_ns": _ns(entries[:, 1], page.ticks_per_ns),
                },
                columns=list(COLUMNS),
            )
        )
    return pd.concat(parts).sort_values("start_ns", ignore_index=True)


def noted_since(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Return what a guest remembers now and did not yet have to remember before."""
    last = before.groupby("thread")["op"].max()
    return after[after["op"] > after["thread"].map(last).fillna(0)].reset_index(drop=True)


def forgotten(before: pd.DataFrame, after: pd.DataFrame) -> list[int]:
    """Return the threads that may have forgotten slow operations between two readings.

    A thread remembers its last `SLOW_ENTRIES - 1`; with fewer, or with one that it remembered
    before, there is no gap.
    """
    last = before.groupby("thread")["op"].max()
    return [
        int(str(thread))
        for thread, ops in after.groupby("thread")["op"]
        if len(ops) == SLOW_ENTRIES - 1 and ops.min() > last.get(thread, 0)
    ]


def slow_entries(octets: bytes) -> U64:
    """Return the entries of a ring, oldest first, one in a row."""
    words = np.frombuffer(octets, "<u8").reshape(SLOW_ENTRIES, SLOW_WORDS)
    written, room = int(words[0, 0]), SLOW_ENTRIES - 1
    if written <= room:
        return words[1 : 1 + written]
    return np.roll(words[1:], -(written % room), axis=0)


def _ns(ticks: U64, ticks_per_ns: float) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    return np.round(ticks.astype(np.int64) / ticks_per_ns).astype(np.int64)


class SlowWritesInstrument(Instrument):
    """The slow operations of a guest that times them and notes the slow ones."""

    title: ClassVar = "slow writes"
    switch: ClassVar = "time_writes"
    tables: ClassVar = {"slow_writes": TABLE}

    before: pd.DataFrame
    after: pd.DataFrame

    @classmethod
    def is_asked(cls, scenario: Scenario) -> bool:
        limits = GUEST_LIMITS[scenario.machine.guest]
        return super().is_asked(scenario) and limits.notes_slow_writes

    def steps(self) -> Mapping[Moment, Step]:
        return {Moment.READY: self._begin, Moment.TAKEN: self._end}

    async def _begin(self) -> None:
        self.before = await read_slow_writes(self.vm)

    async def _end(self) -> None:
        self.after = await read_slow_writes(self.vm)

    def found(self, taken: Taken) -> Found:
        lost = forgotten(self.before, self.after)
        warnings = [
            f"writer {thread} had more than {SLOW_ENTRIES - 1} slow operations, and the earliest "
            "are not in slow_writes"
            for thread in lost
        ]
        return Found(
            tables={"slow_writes": noted_since(self.before, self.after)}, warnings=warnings
        )
