"""What an image is written to."""

from dataclasses import dataclass, field

from lab.scenario.require import require_int


@dataclass(frozen=True, kw_only=True)
class Storage:
    """What the image is written to.

    With `storage_mib_per_s`, a disk of that rate is put between QEMU and the file
    (`lab.snapshot.throttle`): no MiB of the image is written sooner, and QEMU waits for it.  That
    is a rate alone; nothing is done to how long a single write takes, nor to the page cache that
    the file is written to.

    Raises `UsageError` for values that cannot work.
    """

    storage_mib_per_s: int = field(
        default=0,
        metadata={
            "help": "write the image no faster than this; 0: as fast as the disk goes",
            "unit": "MiB/s",
            "title": "rate of the storage",
            "zero": "unlimited",
            "doc": "the image was written no faster than this; 0: as fast as the disk went",
        },
    )

    def __post_init__(self) -> None:
        require_int("storage_mib_per_s", self.storage_mib_per_s, 0, 1024 * 1024)
