"""A process that the lab starts does not outlive the context, the task or the interpreter."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from lab.errors import HostError
from lab.host.process import kill_child, running, wrapped

SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]
BOUND_S = 30.0


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_gone(pid: int) -> None:
    end = time.monotonic() + BOUND_S
    while not is_gone(pid):
        assert time.monotonic() < end, f"process {pid} is still there"
        time.sleep(0.01)


async def test_the_process_is_gone_after_the_context() -> None:
    async with running(SLEEPER, pass_sockets=()) as process:
        assert os.getsid(process.pid) == process.pid
        workdir = process.workdir
    assert process.exit_code == -signal.SIGKILL
    assert is_gone(process.pid)
    assert not workdir.exists()


async def test_the_process_is_gone_after_the_task_was_cancelled() -> None:
    started: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def body() -> None:
        async with running(SLEEPER, pass_sockets=()) as process:
            started.set_result(process.pid)
            await asyncio.sleep(600)

    task = asyncio.create_task(body())
    pid = await started
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert is_gone(pid)


OWNER = textwrap.dedent(
    """
    import asyncio, sys
    from lab.host.process import running
    async def main():
        async with running([sys.executable, "-c", "import time; time.sleep(600)"],
                           pass_sockets=()) as process:
            print(process.pid, flush=True)
            await asyncio.sleep(600)
    asyncio.run(main())
    """
)


def kill_owner(**environment: str) -> int:
    """Start a process by an interpreter of its own, kill that, and return the process's id."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    ) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert not is_gone(pid)
        owner.kill()
    return pid


def test_the_process_is_gone_after_the_interpreter_was_killed(tmp_path: Path) -> None:
    # The temporary directory of a killed interpreter stays; here it is in the test's own.
    wait_gone(kill_owner(TMPDIR=str(tmp_path)))


def test_the_process_is_gone_if_the_interpreter_was_killed_before_it_could_ask_for_a_signal(
    tmp_path: Path,
) -> None:
    setpriv = shutil.which("setpriv")
    late = tmp_path / "setpriv"
    late.write_text(
        f"#!/bin/sh\nwhile ! [ -e {tmp_path}/owner-is-gone ]; do sleep 0.01; done\n"
        f'exec {setpriv} "$@"\n'
    )
    late.chmod(0o755)
    pid = kill_owner(TMPDIR=str(tmp_path), PATH=f"{tmp_path}:{os.environ['PATH']}")
    tmp_path.joinpath("owner-is-gone").touch()
    wait_gone(pid)


async def test_sockets_are_inherited_under_their_number_and_closed_here() -> None:
    ours, theirs = socket.socketpair()
    program = f"import os; os.write({theirs.fileno()}, b'hello')"
    with ours:
        async with running([sys.executable, "-c", program], pass_sockets=(theirs,)) as process:
            assert theirs.fileno() == -1
            assert await process.wait(BOUND_S)
            assert ours.recv(100) == b"hello"
            assert ours.recv(100) == b""


async def test_a_death_is_told_with_the_last_line_and_the_whole_evidence() -> None:
    program = "import sys; sys.stderr.write('first\\nqemu: no such device\\n'); sys.exit(3)"
    command = [sys.executable, "-c", program]
    async with running(command, pass_sockets=()) as process:
        assert await process.wait(BOUND_S)
        error = process.died("starting")
    assert str(error).startswith("QEMU exited with status 3 while starting: qemu: no such device")
    assert "\n" not in str(error)
    assert (error.exit_code, error.command) == (3, command)
    assert error.log_tail == "first\nqemu: no such device"


async def test_a_death_by_signal_names_the_signal() -> None:
    program = "import os; os.kill(os.getpid(), 6)"
    async with running([sys.executable, "-c", program], pass_sockets=()) as process:
        assert await process.wait(BOUND_S)
        assert "was ended by SIGABRT" in str(process.died("running"))


async def test_who_is_killed_while_it_ends_keeps_its_status() -> None:
    codes = set()
    for _ in range(200):
        child = await asyncio.create_subprocess_exec("sleep", "600")
        for _ in range(50):
            kill_child(child)
        codes.add(await child.wait())
    assert codes == {-signal.SIGKILL}


async def test_huge_pages_can_be_forbidden_to_the_process() -> None:
    # PR_GET_THP_DISABLE is 42.
    program = "import ctypes, sys; sys.exit(10 + ctypes.CDLL(None).prctl(42, 0, 0, 0, 0))"
    command = [sys.executable, "-c", program]
    for thp, expected in ((False, 11), (None, 10)):
        async with running(command, pass_sockets=(), thp=thp) as process:
            assert await process.wait(BOUND_S)
            assert process.exit_code == expected


def test_a_host_without_setpriv_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(HostError, match="setpriv"):
        wrapped(["true"], thp=None)
