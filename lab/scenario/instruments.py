"""What watches a measured snapshot."""

from dataclasses import dataclass, field, fields

from lab.scenario.require import require, require_bool, require_int


@dataclass(frozen=True, kw_only=True)
class Instruments:
    """What watches a measured snapshot, besides the guest's progress, which is always sampled
    because cost is computed from it.

    Each can be left out, to see what it costs itself.  What an instrument that is left out would
    have found is unknown.  A guest that times its operations is another workload
    (`Workload.time_writes`).

    `sample_interval_us` is the distance of the samples of progress.  With `known_faults` the lab
    itself writes to that many protected pages while the snapshot is taken, and counts them in the
    fault log: `lab.instruments.knownfaults`.  With `rebuild_huge_pages`, once all else has been
    recorded, the huge pages that the snapshot split are rebuilt: `lab.instruments.hugepages`.
    """

    log_faults: bool = field(
        default=True, metadata={"help": "log every write fault, where QEMU can; on by default"}
    )
    time_threads: bool = field(
        default=True,
        metadata={"help": "record the CPU time of QEMU's threads; on by default", "earlier": False},
    )
    read_host_memory: bool = field(
        default=True,
        metadata={
            "help": "record what is left behind in the host's memory; on by default",
            "earlier": False,
        },
    )

    sample_interval_us: int = field(
        default=1000,
        metadata={
            "help": "distance of the samples of the guest's progress",
            "unit": "us",
            "title": "between samples",
        },
    )
    known_faults: int = field(
        default=0,
        metadata={
            "help": "protected pages that the lab itself writes to, to check the fault log",
            "unit": "1",
            "zero": "none",
        },
    )

    rebuild_huge_pages: bool = field(
        default=False,
        metadata={
            "help": "afterwards put guest RAM into huge pages again, and see what that is worth"
        },
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            if isinstance(f.default, bool):
                require_bool(f.name, getattr(self, f.name))
        # More than a second apart there may be no two samples before the request.
        require_int("sample_interval_us", self.sample_interval_us, 100, 100_000)
        require_int("known_faults", self.known_faults, 0, 4096)
        require(
            self.log_faults or not self.known_faults,
            "known_faults are to be counted in the fault log, which is left out",
            "leave known_faults at 0, or log faults",
        )
