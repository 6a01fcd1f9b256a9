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

import pandas as pd

from lab.host.memory import Residency, process_residency
from lab.runs import columns

READINGS = ("before", "after")

_MIB = 1 << 20
_VMSTAT = ("thp_split_pmd", "thp_split_page")
_MEMINFO = {"Cached": "page_cache_bytes", "Dirty": "dirty_bytes"}
COLUMNS = tuple(columns.COLUMNS["host_memory"])


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

    What can not be read is None: a kernel without huge pages or without rolled-up maps, a process
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
