"""A damaged image is refused in one line, whatever of it is damaged; it never becomes a guest that
is silently another one.

The lab's checksums find any change. What QEMU finds by itself is tested too, because an image may
come without checksums: cut short, it is refused or was whole as far as it matters; a flipped bit
in a page it does not find.
"""

import dataclasses
import hashlib
import os
import random
import re
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

import lab
from lab.errors import RestoreError
from lab.snapshot.image import mark_of, read_sidecar
from lab.snapshot.sidecar import Sidecar, sidecar_path
from tests.support.bench import refusal

pytestmark = [
    pytest.mark.vm,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.platforms("micro-tcg", "micro-kvm"),
]

RAM_MIB = 64
SEED = 20160118

#: A section's footer with its number, and the kind of the next one, in QEMU's migration stream.
BOUNDARY = re.compile(rb"\x7e\x00\x00\x00.(?=[\x00-\x08])", re.DOTALL)
#: All sections but the memory's are at the end, in less than this.
DEVICES_BYTES = 1 << 20


@dataclass(frozen=True)
class Taken:
    """A good image, what its sidecar says, and the SHA-256 of the memory that it holds."""

    image: Path
    sidecar: Sidecar
    memory: str

    def copy(self, folder: Path) -> Path:
        image = folder / "copy.snap"
        shutil.copyfile(self.image, image)
        shutil.copyfile(sidecar_path(self.image), sidecar_path(image))
        return image


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["live", "live-mapped"])
async def taken(
    request: pytest.FixtureRequest, platform: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Taken]:
    folder = tmp_path_factory.mktemp("good")
    image = folder / "good.snap"
    machine = lab.Machine(guest="micro", ram_mib=RAM_MIB)
    async with lab.boot(machine, lab.Workload("random", wss_mib=16)) as vm:
        await vm.snapshot(image, request.param, progress=False)
    memory = await memory_of(image, folder)
    yield Taken(image, read_sidecar(image), memory)


async def memory_of(image: Path, folder: Path) -> str:
    """Restore an image, and return the SHA-256 of the guest's memory."""
    dump = folder / "memory"
    async with lab.restore(image, paused=True) as vm:
        await vm.execute("pmemsave", {"val": 0, "size": RAM_MIB << 20, "filename": str(dump)})
    with dump.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flip(image: Path, at: int, bit: int = 3) -> None:
    with image.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def leave_to_qemu(image: Path, sidecar: Sidecar) -> None:
    """Have the sidecar say what the image is now, so that nobody but QEMU looks at it."""
    with image.open("rb") as file:
        mark = mark_of(file.fileno())
    size = image.stat().st_size
    changed = msgspec.structs.replace(sidecar, checksums=None, image_bytes=size, mark=mark)
    sidecar_path(image).write_text(changed.to_text())


def regions(taken: Taken) -> dict[str, int]:
    """A byte of each kind that an image has, by what it belongs to."""
    content = taken.image.read_bytes()
    page = content.index(b"pc.ram")
    devices = (
        content.rindex(b"cpu_common") if b"cpu_common" in content else content.rindex(b"timer")
    )
    return {
        "the stream's header": 5,
        "the list of memory's blocks": page + 2,
        # In an image where pages have places, bitmaps and holes lie between.
        "what follows the list": page + 64,
        "pages": len(content) // 2,
        "the devices' state": devices + 20,
        "the last byte": len(content) - 1,
    }


async def test_a_flipped_bit_is_found_wherever_it_is(taken: Taken, tmp_path: Path) -> None:
    image = taken.copy(tmp_path)
    rng = random.Random(SEED)
    size = taken.sidecar.image_bytes
    places = [*regions(taken).values(), *(rng.randrange(size) for _ in range(20))]
    for at in places:
        bit = rng.randrange(8)
        flip(image, at, bit)
        line = await refusal(image)
        start, end = (int(n) for n in re.findall(r"bytes (\d+) to (\d+)", line)[0])
        assert "is damaged" in line
        assert start <= at <= end
        flip(image, at, bit)
    assert await memory_of(image, tmp_path) == taken.memory


async def test_qemu_itself_does_not_find_a_flipped_bit_in_a_page(
    taken: Taken, tmp_path: Path
) -> None:
    image = taken.copy(tmp_path)
    # In memory that the guest has written to: ROMs are at the end.
    content = image.read_bytes()
    at = next(
        at
        for at in range(len(content) // 16 // 4096 * 4096 + 2048, len(content), 4096)
        if any(content[at : at + 64])
    )
    flip(image, at)
    await refusal(image)
    leave_to_qemu(image, taken.sidecar)
    assert await memory_of(image, tmp_path) != taken.memory


async def test_a_check_can_be_left_out(taken: Taken, tmp_path: Path) -> None:
    image = taken.copy(tmp_path)
    sums = taken.sidecar.checksums
    assert sums is not None
    wrong = dataclasses.replace(sums, sha256=("0" * 64, *sums.sha256[1:]))
    changed = msgspec.structs.replace(taken.sidecar, checksums=wrong)
    sidecar_path(image).write_text(changed.to_text())
    assert "is damaged" in await refusal(image)
    async with lab.restore(image, paused=True, check=False):
        pass


async def test_a_truncated_image_is_refused_by_its_size(taken: Taken, tmp_path: Path) -> None:
    image = taken.copy(tmp_path)
    rng = random.Random(SEED)
    for size in (taken.sidecar.image_bytes - 1, rng.randrange(taken.sidecar.image_bytes), 0):
        os.truncate(image, size)
        assert f"has {size} bytes" in await refusal(image)


async def test_qemu_refuses_an_image_that_ends_at_any_section(taken: Taken, tmp_path: Path) -> None:
    content = taken.image.read_bytes()
    first = len(content) - DEVICES_BYTES
    at_devices = [first + found.end() for found in BOUNDARY.finditer(content[first:])]
    assert len(at_devices) > 10
    rng = random.Random(SEED)
    others = [4, 8, rng.randrange(4096), *(rng.randrange(len(content)) for _ in range(4))]
    for size in sorted({*at_devices, *others}, reverse=True):
        image = taken.copy(tmp_path)
        os.truncate(image, size)
        leave_to_qemu(image, taken.sidecar)
        refused, whole = "", ""
        try:
            whole = await memory_of(image, tmp_path)
        except RestoreError as error:
            refused = error.cause
        if refused:
            assert "cannot be restored" in refused, size
        else:
            # Behind the last section is a description that QEMU does not need.
            assert whole == taken.memory, size
            assert not BOUNDARY.search(content, size), size


async def test_an_image_of_a_newer_format_is_refused(taken: Taken, tmp_path: Path) -> None:
    for at in (0, 7):  # what it is, and its version
        image = taken.copy(tmp_path)
        flip(image, at)
        leave_to_qemu(image, taken.sidecar)
        assert "cannot be restored" in await refusal(image)
