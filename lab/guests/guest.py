"""What a guest's side of the lab asks of the VM that the guest runs in."""

from typing import Protocol


class Running(Protocol):
    """A QEMU process with the guest in it, which `lab.vm.vm.RunningVM` is."""

    @property
    def pid(self) -> int:
        """Process id of QEMU."""
        ...

    async def host_address(self, gpa: int) -> int:
        """Return where a guest physical address is mapped in QEMU."""
        ...

    def read_host(self, address: int, length: int) -> bytes:
        """Return QEMU's memory there."""
        ...
