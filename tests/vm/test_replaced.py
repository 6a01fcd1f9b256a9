"""A restore gets one whole image, whatever is given its name before QEMU has read it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

import lab
from lab.scenario.methods import METHODS, Variant
from lab.session import VM
from lab.snapshot.image import OpenImage, check_image
from lab.snapshot.sidecar import sidecar_path
from tests.support.bench import works_on

pytestmark = [
    pytest.mark.vm,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.platforms("micro-tcg"),
]

MACHINE = lab.Machine(guest="micro", ram_mib=64)
WORKLOAD = lab.Workload("random", wss_mib=16)
RESTORES = 6
AT_ONCE = 8
SEVERAL = 10


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vm(platform: str) -> AsyncIterator[VM]:
    async with lab.boot(MACHINE, WORKLOAD) as vm:
        yield vm


async def restored_boot(image: Path, *, channels: int = 1) -> int:
    """Restore an image and let its guest work on; return which boot it is of."""
    async with lab.restore(image, channels=channels) as again:
        await works_on(again)
        return again.ready.nonce


async def test_a_name_that_is_replaced_again_and_again_is_restored(vm: VM, tmp_path: Path) -> None:
    """Field report F10."""
    image = tmp_path / "a.snap"
    await vm.snapshot(image, progress=False)
    replaced = 0

    async def replace() -> None:
        nonlocal replaced
        while True:
            await vm.snapshot(image, progress=False)
            replaced += 1

    task = asyncio.create_task(replace())
    try:
        for _ in range(RESTORES):
            before = replaced
            assert await restored_boot(image) == vm.ready.nonce
            # The next one meets the next image.
            while replaced == before and not task.done():
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
        (ended,) = await asyncio.gather(task, return_exceptions=True)
    assert isinstance(ended, asyncio.CancelledError)
    assert replaced >= RESTORES


READS: list[tuple[str, Variant, int]] = [
    ("live", "patched", 1),
    ("live-mapped", "patched", 1),
    ("live-mapped", "patched", 4),
    ("live-mapped", "unpatched", 4),
    ("stop-and-copy", "unpatched", 1),
]


@pytest.mark.parametrize(("method", "binary", "channels"), READS)
async def test_what_was_checked_is_what_qemu_reads(
    vm: VM,
    method: str,
    binary: Variant,
    channels: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Field report F10.  Another guest's image gets the name between the check and the reading."""
    image, other = tmp_path / "a.snap", tmp_path / "b.snap"
    how = METHODS[method]
    async with lab.boot(MACHINE, WORKLOAD, binary=how.preferred_variant) as taken:
        await taken.snapshot(image, method, progress=False)
        expected = taken.ready.nonce
    await vm.snapshot(other, progress=False)
    replaced = []

    async def replace(checked: OpenImage) -> None:
        await check_image(checked)
        for here, there in ((other, image), (sidecar_path(other), sidecar_path(image))):
            here.replace(there)
        replaced.append(image)

    monkeypatch.setattr("lab.snapshot.restore.check_image", replace)
    async with lab.restore(image, binary=binary, channels=channels) as again:
        assert replaced == [image]
        assert (await again.progress_page()).nonce == expected != vm.ready.nonce
        await works_on(again)
        # QEMU does not keep the image that nobody has a name for any more.
        held = [str(link.readlink()) for link in Path(f"/proc/{again.pid}/fd").iterdir()]
        assert not [path for path in held if "a.snap" in path]
    monkeypatch.undo()
    assert await restored_boot(image) == vm.ready.nonce


async def test_one_image_is_restored_by_several_at_once(vm: VM, tmp_path: Path) -> None:
    image = tmp_path / "a.snap"
    await vm.snapshot(image, progress=False)
    boots = await asyncio.gather(*(restored_boot(image) for _ in range(AT_ONCE)))
    assert boots == [vm.ready.nonce] * AT_ONCE


async def test_restoring_again_and_again_leaves_nothing_in_this_process(
    vm: VM, tmp_path: Path
) -> None:
    image = tmp_path / "a.snap"
    await vm.snapshot(image, progress=False)

    def held() -> tuple[int, int, int]:
        process = Path("/proc/self")
        descriptors = len(list(process.joinpath("fd").iterdir()))
        threads = len(list(process.joinpath("task").iterdir()))
        return descriptors, threads, len(asyncio.all_tasks())

    await restored_boot(image)
    before = held()
    for _ in range(SEVERAL):
        await restored_boot(image)
    assert held() == before
