"""What each guest can do: the limits that a scenario is checked against.

What a guest is made of, and how it talks with the host, is in `lab.guests`.
"""

import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from lab.scenario.workload import WorkloadKind

LabGuest = Literal["linux", "micro"]
"""The guests that the lab makes itself."""

GuestKind = Literal[LabGuest, "image"]


@dataclass(frozen=True, kw_only=True)
class GuestLimits:
    """What one guest can do.

    :param title: what people call it.
    :param min_ram_mib: it does not boot with less RAM.
    :param ram_reserve_mib: RAM that a working set cannot have.
    :param table_share: one MiB per so many of the working set goes to page tables and versions
        besides; None where `ram_reserve_mib` has them.
    :param drivers: the fields of a machine's devices that it has drivers for.
    :param lacks: the kinds of workload that it does not do, and why.
    :param page_kib: sizes of the pages by which it can map its working set.
    :param vcpu_per_writer: whether each writer needs a vCPU of its own.
    :param idle_has_working_set: whether the working set takes RAM when nothing writes to it.
    :param notes_slow_writes: whether one that times its operations notes each slow one.
    :param runs_under_pvm: whether it boots under a KVM that is PVM.
    :param is_users: whether it is the user's own system: it does no workload of the lab's, does not
        say when it is ready, and counts nothing that the lab could read.
    """

    title: str
    min_ram_mib: int
    ram_reserve_mib: int
    table_share: int | None = None
    drivers: frozenset[str] = frozenset()
    lacks: Mapping[WorkloadKind, str] = field(default_factory=dict)
    page_kib: tuple[int, ...] = (4,)
    vcpu_per_writer: bool = False
    idle_has_working_set: bool = False
    notes_slow_writes: bool = False
    runs_under_pvm: bool = False
    is_users: bool = False


GUEST_LIMITS: Mapping[GuestKind, GuestLimits] = types.MappingProxyType(
    {
        "linux": GuestLimits(
            title="Linux guest",
            # It unpacks its initramfs in this much; less ends in a panic at boot.
            min_ram_mib=128,
            # The kernel, its page tables and the initramfs.
            ram_reserve_mib=96,
            drivers=frozenset({"disk", "net", "vnc", "balloon"}),
        ),
        "micro": GuestLimits(
            title="microguest",
            min_ram_mib=16,
            ram_reserve_mib=8,
            table_share=64,
            lacks={"allocate": "has no kernel that it could give memory back to"},
            page_kib=(4, 2048),
            vcpu_per_writer=True,
            idle_has_working_set=True,
            notes_slow_writes=True,
            runs_under_pvm=True,
        ),
        "image": GuestLimits(
            title="user's image",
            # Less than any system needs: what its own needs are is the user's to know.
            min_ram_mib=16,
            ram_reserve_mib=0,
            drivers=frozenset({"disk", "net", "vnc", "balloon"}),
            lacks={
                kind: "does what is installed on its disks, and no workload of the lab's"
                for kind in get_args(WorkloadKind)
                if kind != "idle"
            },
            is_users=True,
        ),
    }
)
"""The limits of every guest."""

LAB_GUESTS: tuple[LabGuest, ...] = get_args(LabGuest)
