"""A notebook that is interrupted, restarted or killed leaves no guest behind."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import psutil
import pytest
from nbclient.exceptions import CellExecutionError, DeadKernelError

pytestmark = [pytest.mark.vm, pytest.mark.notebook, pytest.mark.platforms("tcg")]

# The sleep is far longer than any bound here: what ends the cell is the interrupt.
CELL = """
import asyncio, lab, pathlib
machine, workload = lab.Machine(ram_mib=256), lab.Workload("random", wss_mib=48)
async with lab.boot(machine, workload, binary="unpatched") as vm:
    {before}
    path = pathlib.Path({pid_file!r})
    path.with_suffix(".new").write_text(str(vm.pid))
    path.with_suffix(".new").rename(path)
    {body}
"""
SLEEP = "await asyncio.sleep(3600)"
SNAPSHOT = "await vm.snapshot({image!r}, 'stop-and-copy', before_s=3600)"
BOUND_S = 60.0
FORMAT: Any = nbformat.v4  # its functions are not annotated
STOP_BOUND_S = 2.0  # what Stop promises; it takes a third of a second


class Notebook:
    def __init__(self, client: nbclient.NotebookClient, folder: Path) -> None:
        self.client = client
        self.folder = folder
        self.kernel: Any = client.km
        self.task: asyncio.Task[object] | None = None

    async def run(self, body: str, before: str = "pass") -> psutil.Process:
        """Start the cell; return the guest's QEMU once `body` is about to run."""
        pid_file = self.folder / "pid"
        source = CELL.format(pid_file=str(pid_file), body=body, before=before)
        cell = FORMAT.new_code_cell(source)
        self.client.nb.cells.append(cell)
        self.task = asyncio.create_task(self.client.async_execute_cell(cell, 0))
        await until(lambda: pid_file.exists() or self.has_ended())
        if self.has_ended():
            await self.task
        process = psutil.Process(int(pid_file.read_text()))
        assert "qemu" in process.name()
        return process

    def has_ended(self) -> bool:
        return self.task is not None and self.task.done()


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(BOUND_S):
        while not reached():
            await asyncio.sleep(0.01)


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
async def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Notebook]:
    # The kernel's temporary files, which a killed kernel leaves, go with the test's.
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    nb = FORMAT.new_notebook()
    client = nbclient.NotebookClient(nb, kernel_name="python3", timeout=None)
    async with client.async_setup_kernel(env=dict(os.environ)):
        made = Notebook(client, tmp_path)
        yield made
        if made.task is not None:
            made.task.cancel()
            await asyncio.gather(made.task, return_exceptions=True)


async def test_an_interrupt_ends_the_cell_and_the_guest(notebook: Notebook) -> None:
    process = await notebook.run(SLEEP)
    await notebook.kernel.interrupt_kernel()
    assert notebook.task is not None
    with pytest.raises(CellExecutionError, match=r"CancelledError|KeyboardInterrupt"):
        async with asyncio.timeout(STOP_BOUND_S):
            await notebook.task
    assert is_gone(process)


async def test_an_interrupt_takes_a_snapshot_back(notebook: Notebook, tmp_path: Path) -> None:
    image = tmp_path / "a.snap"
    process = await notebook.run(SNAPSHOT.format(image=str(image)))
    await until(lambda: image.with_name("a.snap.partial").exists())
    await notebook.kernel.interrupt_kernel()
    assert notebook.task is not None
    with pytest.raises(CellExecutionError, match=r"CancelledError|KeyboardInterrupt"):
        async with asyncio.timeout(STOP_BOUND_S):
            await notebook.task
    assert is_gone(process)
    assert list(tmp_path.glob("a.snap*")) == []


async def test_an_interrupt_spares_the_guest_of_a_cell_that_handles_it(notebook: Notebook) -> None:
    """The guest has a session of its own: the terminal's signal does not reach it."""
    body = f"""try:
        {SLEEP}
    except asyncio.CancelledError:
        assert await vm.is_running()"""
    process = await notebook.run(body)
    await notebook.kernel.interrupt_kernel()
    assert notebook.task is not None
    async with asyncio.timeout(STOP_BOUND_S):
        await notebook.task
    assert is_gone(process)


async def test_a_restarted_kernel_leaves_no_guest(notebook: Notebook) -> None:
    process = await notebook.run(SLEEP)
    await notebook.kernel.restart_kernel()
    await until(lambda: is_gone(process))


async def test_a_killed_kernel_leaves_no_guest(notebook: Notebook) -> None:
    process = await notebook.run(SLEEP)
    await notebook.kernel.shutdown_kernel(now=True)
    await until(lambda: is_gone(process))
    assert notebook.task is not None
    with pytest.raises(DeadKernelError):
        async with asyncio.timeout(BOUND_S):
            await notebook.task
