"""Copy RAM while the guest runs until little is left, and stop it for the rest."""

from typing import ClassVar

from lab.mechanisms.base import Mechanism


class Precopy(Mechanism):
    """QEMU's ordinary migration, to a file."""

    writes_again: ClassVar[bool] = True

    def expected_bytes(self, resident: int) -> int:
        # It writes a page again whenever the guest has; half more is usual under load.
        return resident * 3 // 2
