"""A disk's overlays are opened as the disk is."""

from pathlib import Path

import pytest

from lab.disks.chain import Layer
from lab.vm.disks import Disk

LAYER = Layer(
    path=Path("/d/disk.raw"), format="raw", virtual_bytes=1 << 20, allocated_bytes=0, backing=None
)


@pytest.mark.parametrize("aio", ["threads", "native", "io_uring"])
@pytest.mark.parametrize("flag", [False, True])
def test_an_overlay_is_opened_as_its_disk(aio: str, flag: bool) -> None:
    disk = Disk(node="a", layer=LAYER, aio=aio)
    cache = {"direct": flag, "no-flush": not flag}
    disk.note({"node-name": "b", "cache": cache | {"writeback": True}, "detect_zeroes": "on"})
    made = disk.blockdev("c", Path("/d/over.qcow2"))
    assert disk.node == "b"
    assert (made["node-name"], made["driver"], made["detect-zeroes"]) == ("c", "qcow2", "on")
    assert made["file"]["filename"] == "/d/over.qcow2"
    assert made["file"]["aio"] == aio
    assert made["cache"] == made["file"]["cache"] == cache
