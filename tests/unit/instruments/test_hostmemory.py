"""What is left in host memory is what a process of known habits leaves there."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from lab.host.memory import process_residency
from lab.instruments.hostmemory import (
    COLUMNS,
    HostMemory,
    df_host_memory,
    memory_summary,
    read_host_memory,
)

MIB = 1 << 20
HUGE = 2 * MIB
GROWS_MIB = 64

# Each line on stdin is a step: `touch` new memory, with huge pages where there are any; `split`
# every huge page by giving back one small page of it.
_CHILD = """
import mmap, sys
size = int(sys.argv[1]) << 20
huge = 2 << 20
memory = None
print("ready", flush=True)
for line in sys.stdin:
    if line == "touch\\n":
        memory = mmap.mmap(-1, size + huge, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory[: size : mmap.PAGESIZE] = bytes(size // mmap.PAGESIZE)
    else:
        for page in range(0, size, huge):
            memory.madvise(mmap.MADV_DONTNEED, page, mmap.PAGESIZE)
    print("done", flush=True)
"""


class Child:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.pid = process.pid

    def do(self, step: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{step}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"


@pytest.fixture
def child() -> Iterator[Child]:
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(GROWS_MIB)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Child(process)
        process.kill()


def test_memory_that_is_touched_is_seen_in_mib(child: Child) -> None:
    before = read_host_memory(child.pid)
    child.do("touch")
    after = read_host_memory(child.pid)
    summary = memory_summary(df_host_memory(before, after))
    # Huge pages at the ends may hold more than what was touched.
    assert summary["rss_growth_mib"] == pytest.approx(GROWS_MIB, abs=6)
    assert after.t_ns > before.t_ns


def test_huge_pages_that_are_split_are_lost_and_counted(child: Child) -> None:
    child.do("touch")
    before = read_host_memory(child.pid)
    if not before.huge_bytes:
        pytest.skip("this host gives no transparent huge pages")
    child.do("split")
    after = read_host_memory(child.pid)
    summary = memory_summary(df_host_memory(before, after))
    lost_mib, splits = summary["thp_lost_mib"], summary["thp_splits"]
    assert lost_mib is not None
    assert splits is not None
    assert after.huge_bytes is not None
    # One page of each was given back; the interpreter may have some of its own.
    assert after.huge_bytes <= before.huge_bytes // 2
    assert lost_mib == (before.huge_bytes - after.huge_bytes) / MIB
    # Other processes of the host may have split some as well.
    assert splits >= lost_mib * MIB // HUGE


def test_what_the_kernel_says_is_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "smaps_rollup").write_text(
        "55d0-7ffd ---p 00000000 00:00 0  [rollup]\n"
        "Rss:               4096 kB\n"
        "AnonHugePages:     2048 kB\n"
        "ShmemPmdMapped:    1024 kB\n"
        "FilePmdMapped:      512 kB\n"
        "Shared_Hugetlb:       0 kB\n"
        "Private_Hugetlb:   8192 kB\n"
    )
    (tmp_path / "vmstat").write_text("thp_split_page 3\nthp_split_page_failed 9\nthp_split_pmd 7\n")
    (tmp_path / "meminfo").write_text(
        "MemTotal: 100 kB\nCached: 10 kB\nSwapCached: 1 kB\nDirty: 2 kB\nHugePages_Total:   0\n"
    )
    found = read_host_memory(5, tmp_path)
    assert found == HostMemory(
        t_ns=found.t_ns,
        resident_bytes=12 * MIB,
        huge_bytes=3 * MIB,
        thp_split_pmd=7,
        thp_split_page=3,
        page_cache_bytes=10 * 1024,
        dirty_bytes=2 * 1024,
    )


def test_what_the_kernel_does_not_say_is_unknown_and_not_zero(tmp_path: Path) -> None:
    nothing = read_host_memory(os.getpid(), tmp_path)
    assert nothing == HostMemory(t_ns=nothing.t_ns)
    table = df_host_memory(nothing, read_host_memory(os.getpid()))
    assert list(table.columns) == list(COLUMNS)
    assert table.loc[0, list(COLUMNS[2:])].isna().all()
    summary = memory_summary(table)
    assert set(summary.values()) == {None}
    assert memory_summary(None) == summary


def test_a_process_that_is_gone_is_unknown_and_the_host_is_not(child: Child) -> None:
    child.process.kill()
    child.process.wait()
    with pytest.raises(OSError):
        process_residency(child.pid)
    found = read_host_memory(child.pid)
    assert found.resident_bytes is None
    assert found.page_cache_bytes


def test_differences_are_signed_and_in_the_units_of_their_names() -> None:
    before = HostMemory(1, 10 * MIB, 6 * MIB, 5, 1, 100 * MIB, 0)
    after = HostMemory(2, 9 * MIB, 2 * MIB, 9, 1, 130 * MIB, MIB)
    table = df_host_memory(before, after)
    assert isinstance(table, pd.DataFrame)
    assert memory_summary(table) == {
        "rss_growth_mib": -1.0,
        "thp_lost_mib": 4.0,
        "thp_splits": 4,
        "page_cache_growth_mib": 30.0,
    }
