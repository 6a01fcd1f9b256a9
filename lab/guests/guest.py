"""What a guest is: found or made, put into a QEMU, and talked with.

To add one: a `Guest` and a `BuiltGuest` in a folder of its own, an entry in `registry.GUESTS`, and
its limits in `lab.scenario.guests`.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lab.guests.console import Console
from lab.guests.protocol import ReadyRecord
from lab.scenario.guests import GUEST_LIMITS, GuestKind, GuestLimits
from lab.scenario.machine import Machine
from lab.scenario.workload import Workload

VERIFY_TIMEOUT_S = 120.0
"""For a guest that compares every word of its working set: a second per GiB or two."""

Progress = Callable[[str], None]

_T = TypeVar("_T")


class Running(Protocol):
    """A QEMU process with the guest in it, which `lab.vm.vm.RunningVM` is."""

    console: Console

    @property
    def pid(self) -> int:
        """Process id of QEMU."""
        ...

    async def watched(self, work: Awaitable[_T], doing: str) -> _T:
        """Await `work`; when it fails because QEMU died, raise the error that says why."""
        ...

    async def host_address(self, gpa: int) -> int:
        """Return where a guest physical address is mapped in QEMU."""
        ...

    def read_host(self, address: int, length: int) -> bytes:
        """Return QEMU's memory there."""
        ...


@dataclass(frozen=True, kw_only=True)
class BuiltGuest(ABC):
    """A guest that QEMU can boot.

    :param kernel_version: what its kernel says it is.
    :param kernel_sha256: hash of its kernel, or of what it has instead.
    """

    kernel_version: str
    kernel_sha256: str

    def recorded(self) -> dict[str, Any]:
        """What a set records: all but where the files lie, which is this machine's business."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if not isinstance(value, Path)}

    @abstractmethod
    def write_firmware(self, path: Path, machine: Machine, workload: Workload) -> None:
        """Write what the machine boots from, where that is the guest itself."""

    @abstractmethod
    def arguments(self, machine: Machine, workload: Workload, firmware: Path) -> list[str]:
        """Return QEMU's arguments that boot it into a workload.

        :param firmware: what `write_firmware` has written, if it has.
        """

    @abstractmethod
    async def wait_ready(self, vm: Running, not_nonce: int | None, timeout_s: float) -> ReadyRecord:
        """Wait until the writers of a guest that boots run.

        :param not_nonce: that of a boot which is over, and of which there may be traces.
        :raise GuestError: when it refuses the workload.
        :raise GuestSilentError: when it does not run in time.
        :raise LaunchError: when QEMU has died.
        """

    @abstractmethod
    async def count_bad_pages(self, vm: Running) -> int:
        """Have it stop its writers, compare every word of its working set and go on.

        :raise GuestSilentError: when it does not answer.
        """


class Guest(ABC):
    """One kind of guest."""

    name: GuestKind
    recorded_as: str
    """What a set calls its software."""
    probe: Machine
    """A machine that shows whether KVM runs it."""

    @property
    def limits(self) -> GuestLimits:
        """What it can do."""
        return GUEST_LIMITS[self.name]

    @abstractmethod
    def find(self) -> BuiltGuest:
        """Return what is in the cache, without building or downloading anything.

        :raise HostError: when it is not built, or was built from other sources.
        """

    @abstractmethod
    async def ensure(self, progress: Progress | None = None) -> BuiltGuest:
        """Return it, after downloading and building what is missing.

        Quick when nothing is missing.  Two of these at the same time do the work twice, but both
        end with complete files.

        :param progress: called with one line for each step that takes time.
        :raise HostError: when a tool is missing.
        :raise BuildError: when a download or the compilation fails.
        """
