"""One thing to measure: a machine, its workload, a method, its storage, its instruments."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from lab.scenario.guests import GUEST_LIMITS, LAB_GUESTS
from lab.scenario.instruments import Instruments
from lab.scenario.machine import Machine
from lab.scenario.methods import METHODS, Method, Variant, method
from lab.scenario.require import require
from lab.scenario.storage import Storage
from lab.scenario.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One thing to measure: a machine, its workload, the method, by name, the storage that the
    image goes to, and what watches it.

    Raises `UsageError` when they cannot go together.
    """

    machine: Machine = field(default_factory=Machine)
    workload: Workload = field(default_factory=Workload)
    method: str = "live"
    storage: Storage = field(default_factory=Storage)
    instruments: Instruments = field(default_factory=Instruments)

    def __post_init__(self) -> None:
        check_storage(method(self.method), self.storage)
        check_fit(self.machine, self.workload)
        require(
            not self.machine.sets_sizes or method(self.method).runs_on("patched"),
            f"{self.method} is of the unpatched QEMU, which has no engine copy to give sizes to",
            "leave fault_around_pages and chunk_kib unset, or choose another method",
        )
        if self.instruments.known_faults:
            require(
                method(self.method).engine is not None,
                f"{self.method} has no fault log to count known_faults in",
                "choose a live method, or leave known_faults at 0",
            )
            require(
                self.workload.kind == "idle",
                f"a guest with the workload {self.workload.kind} writes to the pages of "
                "known_faults itself",
                "use the workload idle",
            )

    @property
    def variant(self) -> Variant:
        """The QEMU binary that this scenario is measured with."""
        return "patched" if self.machine.sets_sizes else method(self.method).preferred_variant


def check_fit(machine: Machine, workload: Workload) -> None:
    """Raise `UsageError` unless the machine's guest can do this: its limits permit the workload,
    and the working set fits into its RAM.
    """
    limits = GUEST_LIMITS[machine.guest]
    require(
        workload.kind not in limits.lacks,
        f"the {limits.title} {limits.lacks.get(workload.kind)}",
        "choose another workload, or guest "
        + _or(kind for kind in LAB_GUESTS if workload.kind not in GUEST_LIMITS[kind].lacks),
    )
    require(
        not limits.vcpu_per_writer or workload.kind == "idle" or workload.threads <= machine.vcpus,
        f"{workload.threads} writers of the {limits.title} need as many vCPUs",
        f"use vcpus={workload.threads} or more, or fewer threads",
    )
    require(
        workload.page_kib in limits.page_kib,
        f"the {limits.title} maps its working set by pages of {_or(limits.page_kib)} KiB",
        "leave page_kib unset, or use guest "
        + _or(kind for kind in LAB_GUESTS if workload.page_kib in GUEST_LIMITS[kind].page_kib),
    )
    room_mib = machine.ram_mib - limits.ram_reserve_mib
    if limits.table_share is not None:
        room_mib -= -(-workload.wss_mib // limits.table_share)
    require(
        (workload.kind == "idle" and not limits.idle_has_working_set)
        or workload.wss_mib <= room_mib,
        f"a working set of {workload.wss_mib} MiB does not fit into {machine.ram_mib} MiB of RAM",
        f"use wss_mib={max(room_mib, 1)} or less, or more RAM",
    )


def _or(values: Iterable[object]) -> str:
    return " or ".join(map(str, values))


def check_storage(how: Method, storage: Storage) -> None:
    """Raise `UsageError` unless the method can write to the storage."""
    require(
        not storage.storage_mib_per_s or how.is_stream,
        f"{how.name} writes here and there in a file, which storage of a limited rate is not",
        "leave storage_mib_per_s at 0, or choose from: "
        + ", ".join(m.name for m in METHODS.values() if m.is_stream),
    )
