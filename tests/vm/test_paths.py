"""An image can have any name that a file can have, and what has the name already is safe."""

import asyncio
import os
import shlex
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

import lab
from lab.errors import SnapshotError
from lab.session import VM
from lab.snapshot.sidecar import sidecar_path
from tests.support.bench import is_left_alone

pytestmark = [
    pytest.mark.vm,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.platforms("micro-tcg"),
]

MACHINE = lab.Machine(guest="micro", ram_mib=32)
WORKLOAD = lab.Workload("random", wss_mib=8)

NAMES = (
    "with space",
    'double"quote',
    "single'quote",
    "comma,comma,,offset=0",
    "file:colon:1",
    "100%s %n",
    "new\nline",
    "-leading-dash",
    "$(reboot)`reboot`;reboot",
    "back\\slash",
    "Schnappschuß 快照",
    "x" * 242,
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vm(platform: str) -> AsyncIterator[VM]:
    async with lab.boot(MACHINE, WORKLOAD) as booted:
        yield booted


@pytest.mark.parametrize("method", ["live", "live-mapped", "migrate-to-file"])
async def test_any_name_is_taken_and_restored(vm: VM, method: str, tmp_path: Path) -> None:
    for name in NAMES:
        image = tmp_path / name
        await vm.snapshot(image, method, progress=False)
        assert {path.name for path in tmp_path.iterdir()} == {name, f"{name}.json"}
        async with lab.restore(image, paused=True) as again:
            assert again.ready == vm.ready
        image.unlink()
        sidecar_path(image).unlink()


async def test_a_path_that_is_no_text_is_refused_in_one_line(vm: VM, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    with pytest.raises(SnapshotError, match="its path is not UTF-8"):
        await vm.snapshot(folder / "a.snap", "live", progress=False)
    assert list(folder.iterdir()) == []
    await is_left_alone(vm)
    image = tmp_path / "a.snap"
    await vm.snapshot(image, "live", progress=False)
    for path in (image, sidecar_path(image)):
        path.rename(folder / path.name)
    # To restore an image QEMU is not told its path.
    async with lab.restore(folder / "a.snap", paused=True) as again:
        assert again.ready == vm.ready


async def test_of_a_link_only_the_link_is_replaced(vm: VM, tmp_path: Path) -> None:
    target, image = tmp_path / "target", tmp_path / "a.snap"
    target.write_text("precious")
    image.symlink_to(target)
    await vm.snapshot(image, "live", progress=False)
    assert target.read_text() == "precious"
    assert not image.is_symlink()
    async with lab.restore(image, paused=True):
        pass


async def test_a_fifo_and_a_folder_are_refused_and_the_guest_runs_on(
    vm: VM, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, what in ((tmp_path / "fifo", "a FIFO"), (tmp_path, "a directory")):
        with pytest.raises(SnapshotError, match=f"is {what}; name a file"):
            await vm.snapshot(path, "live", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["fifo"]
    await is_left_alone(vm)


async def test_a_folder_that_can_not_be_written_to_is_refused(vm: VM, tmp_path: Path) -> None:
    # Of the kernel's own file systems nobody can write to this one, root included.
    with pytest.raises(SnapshotError, match="cannot be created") as caught:
        await vm.snapshot("/proc/self/a.snap", "live", progress=False)
    assert caught.value.remedy
    await is_left_alone(vm)


async def test_the_command_line_takes_such_names(tmp_path: Path) -> None:
    guest = shlex.split("--guest micro --accel tcg --ram-mib 32 --wss-mib 8")
    image = str(tmp_path / "-a b,c'd\"e")
    assert await lab_command("snapshot", image, *guest) == (0, "")
    assert await lab_command("restore", image, "--seconds", "1") == (0, "")
    status, said = await lab_command("snapshot", str(tmp_path), *guest)
    assert status == 1
    assert said.endswith("is a directory; name a file\n")


async def lab_command(*arguments: str) -> tuple[int, str]:
    """Run a command of the lab's; return its status, and its errors if it failed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lab", *arguments),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode() if process.returncode else ""
