"""A snapshot that was taken: its times, tables and figures.

What the times of a `Snapshot` are:

`setup_ms`
    request until QEMU stops the vCPUs: preparation while the guest runs.  For ordinary migration
    that is the whole copy until the last round.
`pause_ms`
    vCPUs stopped: QEMU's STOP event until its RESUME event.  An ordinary migration leaves the
    vCPUs stopped; the lab lets them go on as soon as it sees the migration completed, and that is
    the RESUME which counts.
`duration_ms`
    request until QEMU reports the migration completed, when it has handed everything over.  Not in
    it: closing the image, renaming it, writing the sidecar; and, with storage of a limited rate,
    writing what is on its way to the file then, which is a fraction of a MiB
    (`lab.snapshot.throttle`).

The request is the moment before the first command is sent that affects the guest: `migrate`, or
`stop` for `stop-and-copy`.  What is not measured here: what the guest lost in speed, which is what
`df_progress()` is for.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lab.display import html_row
from lab.errors import UsageError
from lab.instruments.faultlog import FaultLog, fault_summary
from lab.instruments.phases import buffer_summary, df_phases
from lab.instruments.progress import ProgressSampler
from lab.instruments.writelatency import stall_summary
from lab.marks import Marks, with_marks
from lab.qemu.build import QemuBinary
from lab.scenario.dimensions import dimensions
from lab.scenario.machine import Machine
from lab.scenario.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A snapshot that was taken, and how that went.  See the module for what the times are.

    The tables name the snapshot in their `attrs` (`case` and its instants, as in `marks`),
    so that `lab.plot_*` draw them as they are.

    Of its `marks`, `stop_ns` and `resume_ns` are None when the guest was stopped before and stayed
    so.
    """

    path: Path
    method: str
    engine: str | None
    outcome: str
    machine: Machine
    workload: Workload
    binary: QemuBinary
    marks: Marks
    image_bytes: int
    counters: dict[str, int]
    migration: dict[str, Any] = dataclasses.field(repr=False)
    """QEMU's last reply to `query-migrate`."""
    fault_log: FaultLog | None = dataclasses.field(repr=False)
    sampler: ProgressSampler | None = dataclasses.field(default=None, repr=False)
    write_latency: pd.DataFrame | None = dataclasses.field(default=None, repr=False)
    storage_mib_per_s: int = 0
    """The image was written no faster than this; 0: as fast as the disk went."""

    @property
    def request_ns(self) -> int:
        """The moment before the first command was sent that affects the guest."""
        assert self.marks.request_ns is not None
        return self.marks.request_ns

    @property
    def stop_ns(self) -> int | None:
        """QEMU's STOP event."""
        return self.marks.stop_ns

    @property
    def resume_ns(self) -> int | None:
        """QEMU's RESUME event."""
        return self.marks.resume_ns

    @property
    def end_ns(self) -> int:
        """QEMU reported the migration completed."""
        assert self.marks.end_ns is not None
        return self.marks.end_ns

    @property
    def setup_ms(self) -> float | None:
        """Request until the vCPUs were stopped."""
        return None if self.stop_ns is None else (self.stop_ns - self.request_ns) / 1e6

    @property
    def pause_ms(self) -> float | None:
        """How long the vCPUs were stopped."""
        if self.stop_ns is None or self.resume_ns is None:
            return None
        return (self.resume_ns - self.stop_ns) / 1e6

    @property
    def duration_ms(self) -> float:
        """Request until the migration was completed."""
        return (self.end_ns - self.request_ns) / 1e6

    def df_phases(self) -> pd.DataFrame:
        """Return the engine's phases: `phase`, `start_ns`, `end_ns`, `duration_ns`.

        Empty where QEMU does not tell: only the patched one does, for live methods.
        """
        return self._marked(df_phases(self.migration))

    def df_faults(self) -> pd.DataFrame:
        """Return one row for each write fault; `FaultLog` lists the columns.

        :raise UsageError: when there is no fault log.
        """
        if self.fault_log is None:
            raise UsageError(
                f"there is no fault log of a {self.method} snapshot",
                "use a live method of the patched QEMU, with fault_log=True",
            )
        return self._marked(self.fault_log.df)

    def df_progress(self) -> pd.DataFrame:
        """Return the samples of the guest's progress: `t_ns`, `ops`, `read_ns`.

        :raise UsageError: when progress was not sampled.
        """
        if self.sampler is None:
            raise UsageError("progress was not sampled", "use progress=True")
        return self._marked(self.sampler.df())

    def df_write_latency(self) -> pd.DataFrame:
        """Return how long the guest's operations took, as a histogram.

        Columns: `window` (`during`: request until completion; `before`: until the request),
        `low_ns`, `high_ns`, `ops`; see `lab.instruments.writelatency`.

        :raise UsageError: when the guest did not time them.
        """
        if self.write_latency is None:
            raise UsageError("the guest did not time its operations", "boot with time_writes=True")
        return self._marked(self.write_latency)

    def _marked(self, table: pd.DataFrame) -> pd.DataFrame:
        return with_marks(table, {"method": self.method}, self.marks)

    def summary(self) -> dict[str, Any]:
        """Return one flat row: the scenario's dimensions, times in ms, size and fault counts."""
        return {
            "method": self.method,
            "engine": self.engine,
            "outcome": self.outcome,
            **dimensions(self.machine),
            **dimensions(self.workload),
            "storage_mib_per_s": self.storage_mib_per_s,
            "setup_ms": self.setup_ms,
            "pause_ms": self.pause_ms,
            "duration_ms": self.duration_ms,
            "image_bytes": self.image_bytes,
            **fault_summary(None if self.fault_log is None else self.fault_log.df),
            **buffer_summary(self.counters),
            **stall_summary(self.write_latency),
        }

    def __repr__(self) -> str:
        pause = "not paused" if self.pause_ms is None else f"pause {self.pause_ms:.2f} ms"
        return (
            f"Snapshot({self.method!r}, {self.path.name!r}, {pause}, "
            f"duration {self.duration_ms:.0f} ms, {self.image_bytes / (1 << 20):.0f} MiB)"
        )

    def _repr_html_(self) -> str:
        cells = {
            "method": self.method,
            "image": self.path.name,
            "set-up": _ms(self.setup_ms),
            "pause": _ms(self.pause_ms),
            "duration": _ms(self.duration_ms),
            "size": f"{self.image_bytes / (1 << 20):.0f} MiB",
            "faults": "-" if self.fault_log is None else str(len(self.fault_log.df)),
        }
        return html_row(cells)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} ms"
