"""A QEMU that runs already: which process it is, and what its machine is and permits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lab.vm.qmp import Qmp


@dataclass(frozen=True, kw_only=True)
class MigrationSettings:
    """How a QEMU's migration was set."""

    capabilities: Mapping[str, bool]
    parameters: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """What a QEMU that the lab did not start is, as its monitor says."""

    pid: int
    version: str
    """Such as "10.0.13"."""
    package: str
    """What its distributor added to the version; may be empty."""
    patched: bool
    """Whether it is the lab's, with the snapshot engines."""
    accel: Literal["kvm", "tcg"]
    vcpus: int
    ram_mib: int
    """What the guest was started with, and what was plugged in since, in MiB."""
    machine_type: str
    """The versioned name, such as pc-i440fx-10.0."""
    run_state: str
    """Such as "running" or "paused"."""
    saved: MigrationSettings
    """How its migration is set; `put_back` sets it so again."""

    @property
    def capabilities(self) -> frozenset[str]:
        """The migration capabilities that it has, switched on or not."""
        return frozenset(self.saved.capabilities)

    @property
    def has_background_snapshot(self) -> bool:
        """Whether it can save memory while the guest runs, by write protection."""
        return "background-snapshot" in self.saved.capabilities

    @property
    def has_mapped_ram(self) -> bool:
        """Whether it can give each page its place in the image."""
        return "mapped-ram" in self.saved.capabilities


async def find_process(qmp: Qmp) -> int:
    """Return the process id of the QEMU at the other end of a monitor.

    It is found by the threads of its vCPUs, since the socket may have been made by another process.

    :raise HostError: when no process here has these threads, or it is another user's.
    """
    raise NotImplementedError


async def describe(qmp: Qmp, pid: int) -> Peer:
    """Return what a QEMU is.  Changes nothing.

    :raise SnapshotError: when a migration runs, or the QEMU waits for one.
    :raise QmpError: when it is too old to answer.
    """
    raise NotImplementedError


async def put_back(qmp: Qmp, saved: MigrationSettings) -> None:
    """Set the migration as it was.  What cannot be set is left, and logged.

    :raise QmpError: when the QEMU is gone.
    """
    raise NotImplementedError
