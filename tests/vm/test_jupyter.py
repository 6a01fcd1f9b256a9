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


IN_A_SUBSHELL = """
import lab
context = lab.boot(lab.Machine(guest="micro", ram_mib=64), lab.Workload("random", wss_mib=16))
vm = await context.__aenter__()
print(vm.pid)
"""
USED_ELSEWHERE = """
try:
    await vm.status()
except lab.UsageError as error:
    print(error)
"""


async def printed(client: Any, code: str, subshell: str | None = None) -> str:
    """Run code in the kernel, or in a subshell of it; return what it prints."""
    message = client.session.msg("execute_request", {"code": code, "silent": False})
    message["header"]["subshell_id"] = subshell
    client.shell_channel.send(message)
    text = ""
    async with asyncio.timeout(BOUND_S):
        while True:
            reply = await client.iopub_channel.get_msg()
            if reply["parent_header"].get("msg_id") != message["header"]["msg_id"]:
                continue
            if reply["msg_type"] == "error":
                raise AssertionError(reply["content"])
            text += str(reply["content"].get("text", ""))
            if reply["content"].get("execution_state") == "idle":
                return text


async def control(client: Any, kind: str, **content: object) -> dict[str, Any]:
    client.control_channel.send(client.session.msg(kind, content))
    async with asyncio.timeout(BOUND_S):
        reply: dict[str, Any] = (await client.control_channel.get_msg())["content"]
    assert reply["status"] == "ok"
    return reply


async def test_a_guest_of_a_deleted_subshell_is_refused_in_one_line_and_ended(
    notebook: Notebook,
) -> None:
    """Field report F23."""
    client: Any = notebook.client.kc
    subshell = (await control(client, "create_subshell_request"))["subshell_id"]
    process = psutil.Process(int(await printed(client, IN_A_SUBSHELL, subshell)))
    assert "qemu" in process.name()
    assert "belongs to the event loop of thread" in await printed(client, USED_ELSEWHERE)
    await control(client, "delete_subshell_request", subshell_id=subshell)
    assert not is_gone(process)
    line = await printed(client, USED_ELSEWHERE)
    assert "which has ended, and so has the guest" in line
    assert line.count("\n") == 1
    await until(lambda: is_gone(process))
