"""What the guest does."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from lab.scenario.require import require, require_choice, require_int

WorkloadKind = Literal[
    "idle",
    "sequential",
    "random",
    "scattered",
    "zipf",
    "hotcold",
    "readmostly",
    "allocate",
]

PAGE_KIB = (4, 2048)
"""Sizes of the pages that some guest can map its working set by."""


@dataclass(frozen=True)
class Workload:
    """What the guest does: `threads` writers, each over its share of a working set of `wss_mib`.

    An operation checks one page and writes three words of it, except where the table says more;
    `lab/guests/README.md` defines each kind to the bit.

    ============  =====================================================  ===========================
    kind          pages                                                  stands for
    ============  =====================================================  ===========================
    `idle`        none                                                   a standby
    `sequential`  one after the other, over and over                     a log writer, a stream
    `random`      any, uniformly: nothing to foresee or cache            the worst case
    `scattered`   one in 64, uniformly                                   a hash index, large records
    `zipf`        the page of rank r in proportion to 1/r, ranks spread  a key-value cache
    `hotcold`     9 of 10 to a tenth that moves on, uniformly            a database's buffer pool
    `readmostly`  any, uniformly; 9 of 10 operations only read           a web server, its cache
    `allocate`    given back to the guest's kernel and touched anew      compilers, a collected heap
    ============  =====================================================  ===========================

    `seed` fixes the sequence of pages, so that a host can replay it (`allocate` takes no part in
    that).  With `time_writes` the guest times each operation, which makes all of them slower.

    Writers work as fast as they can, or all together at `rate_ops_per_s`.  That is a program which
    has so much to do and is idle otherwise: a delay of up to 10 ms is made up for, and what a
    longer one cost is lost.

    The microguest can map its working set by pages of 2 MiB (`page_kib` 2048), as a guest with
    transparent huge pages of its own does.  It does not allocate, has no more writers than vCPUs,
    and does not sleep: a paced or an idle one keeps its vCPUs busy with waiting.

    Raises `UsageError` for values that cannot work.
    """

    kind: WorkloadKind = field(
        default="random",
        metadata={
            "help": "what the guest writes",
            "dimension": "workload",
            "doc": "what the guest runs",
        },
    )
    _: dataclasses.KW_ONLY
    wss_mib: int = field(
        default=256,
        metadata={
            "help": "working set in MiB",
            "unit": "MiB",
            "title": "working set",
            "doc": "working set the guest writes to",
        },
    )
    threads: int = field(
        default=1, metadata={"help": "writer threads in the guest", "unit": "1", "title": "writers"}
    )
    seed: int = field(default=1, metadata={"help": "seed of the page sequence"})
    time_writes: bool = field(
        default=False, metadata={"help": "have the guest time each operation, which slows it down"}
    )
    rate_ops_per_s: int = field(
        default=0,
        metadata={
            "help": "operations of all writers in a second; 0: as many as they can do",
            "unit": "1/s",
            "title": "rate asked of the guest",
            "zero": "unlimited",
            "doc": "operations that the guest was to do in a second; 0: as many as it could",
        },
    )
    page_kib: int = field(
        default=4,
        metadata={
            "help": "guest pages that map the working set: 4, or 2048 in the microguest",
            "unit": "KiB",
            "title": "guest page",
        },
    )

    def __post_init__(self) -> None:
        require_choice("workload", self.kind, WorkloadKind)
        require_int("wss_mib", self.wss_mib, 1, 1024 * 1024)
        require_int("threads", self.threads, 1, 62)  # counters that fit into the progress page
        require_int("seed", self.seed, 0, 2**63 - 1)
        require(
            not (self.time_writes and self.kind == "idle"),
            "an idle guest has no writes to time",
            "choose another workload, or time_writes=False",
        )
        require_int("rate_ops_per_s", self.rate_ops_per_s, 0, 1_000_000_000)
        require(
            not (self.rate_ops_per_s and self.kind == "idle"),
            "an idle guest has no rate of writes",
            "choose another workload, or rate_ops_per_s=0",
        )
        require(
            self.page_kib in PAGE_KIB,
            f"page_kib is {self.page_kib!r}",
            f"choose from: {', '.join(map(str, PAGE_KIB))}",
        )
