"""What a snapshot leaves behind in the host's memory.

Read twice: the memory of the QEMU process, how much of it is huge pages, how often this host has
split one, and the page cache.  What differs is what the snapshot did, together with all else that
happened on the host meanwhile: only the first two are QEMU's own.

The kernel walks the page tables of the whole process to answer, and page faults may have to wait
for locks that it holds meanwhile.  So both readings lie outside of everything that is timed: the
first one before the baseline's second, the other after progress has been recorded to its end.
What a snapshot uses only while it runs, as its copy buffer, is not in the difference.
"""

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pandas as pd

from lab.column import Column, Metric
from lab.host.memory import Residency, process_residency
from lab.instruments.instrument import Found, Instrument, Moment, Step, Taken

READINGS = ("before", "after")

_MIB = 1 << 20
_MEMINFO = {"Cached": "page_cache_bytes", "Dirty": "dirty_bytes"}
TABLE = (
    Column(
        "reading",
        "text",
        "",
        "`before`: before the baseline; `after`: after progress was recorded to its end",
    ),
    Column("t_ns", "int64", "ns", "CLOCK_MONOTONIC at its beginning"),
    Column("resident_bytes", "int64", "B", "memory that is mapped in the QEMU process"),
    Column(
        "huge_bytes",
        "int64",
        "B",
        "how much of it is transparent huge pages that are mapped as such",
    ),
    Column(
        "thp_split_pmd",
        "int64",
        "1",
        "how often the mapping of a huge page was split, on the host since it booted",
    ),
    Column("thp_split_page", "int64", "1", "how often a huge page itself was split, likewise"),
    Column(
        "page_cache_bytes",
        "int64",
        "B",
        "the host's page cache, with tmpfs and shared memory",
    ),
    Column("dirty_bytes", "int64", "B", "what of it has yet to be written"),
)
COLUMNS = tuple(column.name for column in TABLE)

METRICS = (
    Metric(
        "rss_growth_mib",
        "float64",
        "MiB",
        "memory mapped in the QEMU process, after against before; null when nobody read it, like "
        "the next three",
        title="RSS growth MiB",
    ),
    Metric(
        "thp_lost_mib",
        "float64",
        "MiB",
        "transparent huge pages mapped in it, before against after",
        title="THP lost MiB",
    ),
    Metric(
        "thp_splits",
        "int64",
        "1",
        "mappings of huge pages that were split between the readings, on the whole host",
        title="THP splits",
    ),
    Metric(
        "page_cache_growth_mib",
        "float64",
        "MiB",
        "the host's page cache with tmpfs and shared memory, after against before",
        title="page cache growth MiB",
    ),
)


@dataclass(frozen=True)
class HostMemory:
    """One reading, at `t_ns` of CLOCK_MONOTONIC.  None is what the kernel does not say.

    `resident_bytes` and `huge_bytes` are of the process: memory that is mapped in it, and how much
    of that is transparent huge pages that are mapped as such.  The others are of the host: how
    often the mapping of a huge page was split, and how often a huge page itself, since the host
    booted; the page cache, and what of it has yet to be written.
    """

    t_ns: int
    resident_bytes: int | None = None
    huge_bytes: int | None = None
    thp_split_pmd: int | None = None
    thp_split_page: int | None = None
    page_cache_bytes: int | None = None
    dirty_bytes: int | None = None


def read_host_memory(pid: int, proc: Path = Path("/proc")) -> HostMemory:
    """Return what host and process `pid` use now.

    What cannot be read is None: a kernel without huge pages or without rolled-up maps, a process
    that is gone or may not be looked at.
    """
    t_ns = time.monotonic_ns()
    mapped: Residency | None = None
    with contextlib.suppress(OSError):
        mapped = process_residency(pid, proc)
    vmstat = _named_numbers(proc / "vmstat")
    meminfo = _named_numbers(proc / "meminfo")
    cache = {field: meminfo.get(name) for name, field in _MEMINFO.items()}
    return HostMemory(
        t_ns=t_ns,
        resident_bytes=None if mapped is None else mapped.resident,
        huge_bytes=None if mapped is None else mapped.anon_huge + mapped.shmem_huge,
        thp_split_pmd=vmstat.get("thp_split_pmd"),
        thp_split_page=vmstat.get("thp_split_page"),
        **{name: None if kib is None else kib * 1024 for name, kib in cache.items()},
    )


def _named_numbers(path: Path) -> Mapping[str, int]:
    """Read lines of a name and a number, as /proc/vmstat and /proc/meminfo have them."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    words = [line.replace(":", " ").split() for line in lines]
    return {word[0]: int(word[1]) for word in words if len(word) > 1}


def df_host_memory(before: HostMemory, after: HostMemory) -> pd.DataFrame:
    """Return the readings, one row each.

    Columns: `reading` its name; `t_ns`; the fields of `HostMemory`, <NA> where the kernel does not
    say.
    """
    rows = [
        {"reading": name} | {column: getattr(one, column) for column in COLUMNS[1:]}
        for name, one in zip(READINGS, (before, after), strict=True)
    ]
    df = pd.DataFrame(rows, columns=list(COLUMNS))
    return df.astype({"t_ns": "int64"} | dict.fromkeys(COLUMNS[2:], "Int64"))


def memory_summary(readings: pd.DataFrame | None) -> dict[str, float | int | None]:
    """Fields rss_growth_mib, thp_lost_mib, thp_splits and page_cache_growth_mib of the summary
    line; null without readings, and where the kernel does not say.
    """

    def grown(column: str) -> int | None:
        if readings is None:
            return None
        first, last = readings[column]
        return None if pd.isna(first) or pd.isna(last) else int(last) - int(first)

    def mib(amount: int | None) -> float | None:
        return None if amount is None else amount / _MIB

    huge = grown("huge_bytes")
    return {
        "rss_growth_mib": mib(grown("resident_bytes")),
        "thp_lost_mib": mib(None if huge is None else -huge),
        "thp_splits": grown("thp_split_pmd"),
        "page_cache_growth_mib": mib(grown("page_cache_bytes")),
    }


class HostMemoryInstrument(Instrument):
    """What is left behind in the host's memory, read outside of all that is timed."""

    title: ClassVar = "host memory"
    switch: ClassVar = "read_host_memory"
    tables: ClassVar = {"host_memory": TABLE}
    metrics: ClassVar = METRICS

    before: HostMemory
    after: HostMemory

    def steps(self) -> Mapping[Moment, Step]:
        return {Moment.SETTLED: self._begin, Moment.BACK: self._end}

    def _begin(self) -> None:
        self.before = read_host_memory(self.vm.pid)

    def _end(self) -> None:
        self.after = read_host_memory(self.vm.pid)

    def found(self, taken: Taken) -> Found:
        table = df_host_memory(self.before, self.after)
        return Found(tables={"host_memory": table}, figures=memory_summary(table))
