"""The QEMU process: start it so that it cannot outlive its owner, and end it within a bound.

Three measures together, because each alone leaves a guest behind in some case: a session of its
own, or an interrupt of a notebook cell reaches QEMU as well; a parent-death signal, because a
notebook kernel that is restarted or killed runs no clean-up; and a spawn from a thread that lives
as long as this process does, because that signal is sent when the *thread* that spawned ends.  An
event loop may run in a thread that ends before it, or in several, one after the other.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from lab.errors import LaunchError
from lab.host.ksm import PR_SET_MEMORY_MERGE, merges_everything
from lab.host.limits import KilledForMemory
from lab.host.needs import require_setpriv
from lab.host.workdir import private_folder

log = logging.getLogger(__name__)

QUIT_GRACE_S = 1.0
"""How long QEMU may take to obey `quit`; a stopped notebook cell has to end within two seconds."""

KILL_GRACE_S = 30.0
"""How long the kernel may take to tear down a killed QEMU: about 0.1 s for each GiB it held."""

LOG_TAIL_LINES = 12

# A parent that dies before the child has asked for the parent-death signal is not noticed by it:
# the child has another parent by then, and would live for ever.  So it looks once it has asked.
_SAME_PARENT = '[ "$PPID" = "$1" ] || exit 1; shift; exec "$@"'

_PR_SET_THP_DISABLE = 41

# Some of what a process may do with memory only it can set itself, and its children inherit it.  A
# small interpreter makes the calls and becomes QEMU.
_SET_MEMORY = (
    "import ctypes, os, sys\n"
    f"if 'no-thp' in sys.argv[1] and ctypes.CDLL(None).prctl({_PR_SET_THP_DISABLE}, 1, 0, 0, 0):\n"
    "    sys.exit('transparent huge pages cannot be switched off for QEMU')\n"
    f"if 'no-merge' in sys.argv[1] and ctypes.CDLL(None).prctl({PR_SET_MEMORY_MERGE},"
    " 0, 0, 0, 0):\n"
    "    sys.exit('the merging of equal pages cannot be switched off for QEMU')\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


class Started(Protocol):
    """A process as `subprocess` has it."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def kill(self) -> None: ...


class Process:
    """A QEMU that runs.  Made by `running`."""

    is_others = False
    """Whether it is somebody else's, and is not to be ended."""

    def __init__(self, process: Started, command: Sequence[str], workdir: Path) -> None:
        self._process = process
        self.command = list(command)
        self.workdir = workdir
        """A private directory that lives as long as the process."""
        self._out_of_memory = KilledForMemory(process.pid)

    def find_groups(self) -> None:
        """Look again which control groups it is in, as somebody may have moved it."""
        if self.exit_code is None:
            self._out_of_memory = KilledForMemory(self.pid)

    @property
    def pid(self) -> int:
        """The process id of QEMU itself (the wrappers around it exec)."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The exit status, negative for a signal, None while it runs."""
        return self._process.poll()

    @property
    def log_path(self) -> Path:
        """Where QEMU's own output goes."""
        return self.workdir / "qemu.log"

    def log_text(self) -> str:
        """Return what QEMU wrote to stdout and stderr."""
        try:
            return self.log_path.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def messages(self, since: int = 0) -> list[str]:
        """Return the lines that QEMU wrote after the first `since` characters."""
        # It begins its messages with its own path, which helps nobody.
        own = f"{Path(self.command[0]).name}: "
        lines = self.log_text()[since:].splitlines()
        return [line.strip().split(own, 1)[-1] for line in lines if line.strip()]

    def died(self, doing: str) -> LaunchError:
        """Return the error for a QEMU that went away while `doing` something."""
        tail = self.log_text().splitlines()[-LOG_TAIL_LINES:]
        said = next(reversed(self.messages()), "")
        remedy = "see the error's log_tail and command, or `lab -v`"
        if self.exit_code == -signal.SIGKILL and (why := self._out_of_memory.why()):
            said, remedy = why, "choose a smaller guest, or give that cgroup more memory"
        return LaunchError(
            f"QEMU {_how_it_ended(self.exit_code)} while {doing}" + (f": {said}" if said else ""),
            remedy,
            command=self.command,
            log_tail="\n".join(tail),
            exit_code=self.exit_code,
        )

    async def wait(self, timeout_s: float | None) -> bool:
        """Wait for the process to end, for ever if that is None; return whether it has."""
        if self._process.poll() is not None:
            return True
        descriptor = os.pidfd_open(self.pid)
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(descriptor, ended.set)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        return self._process.poll() is not None

    def kill(self) -> None:
        """Send SIGKILL unless it has ended."""
        self._process.kill()


def kill_child(process: asyncio.subprocess.Process) -> None:
    """Send SIGKILL to a child of asyncio's unless it has ended.

    Its own `kill` would look first whether it has, and that reaps it: asyncio then finds no status,
    and says 255.
    """
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "went silent"
    if code >= 0:
        return f"exited with status {code}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"


def wrapped(command: Sequence[str], *, thp: bool | None) -> list[str]:
    """Return `command` with what has to happen in the child before QEMU.

    The kernel may not merge its equal pages: of those write protection would be lost
    (`lab.host.ksm`).

    :raise HostError: when `setpriv` is missing.
    """
    changes = (["no-thp"] if thp is False else []) + (["no-merge"] if merges_everything() else [])
    python = [sys.executable, "-I", "-S", "-c", _SET_MEMORY, ",".join(changes)] if changes else []
    guard = ["sh", "-c", _SAME_PARENT, "sh", str(os.getpid())]
    return [require_setpriv(), "--pdeathsig=KILL", "--", *guard, *python, *command]


@lru_cache(maxsize=1)
def _spawner() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="lab-spawner")


# A process that was forked has no such thread.
os.register_at_fork(after_in_child=_spawner.cache_clear)


def _spawn(
    argv: Sequence[str], output: int, pass_fds: Sequence[int], folder: Path | None
) -> "subprocess.Popen[bytes]":
    """Start a process from the thread that lives as long as this process.

    It takes no longer than starting it here would.
    """
    future = _spawner().submit(
        subprocess.Popen,
        argv,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        # Python ignores SIGXFSZ, and QEMU shall, too: what is larger than a file may be fails a
        # snapshot then, and does not end the guest.
        restore_signals=False,
        pass_fds=pass_fds,
        cwd=folder,
    )
    try:
        return future.result()
    except KeyboardInterrupt:
        future.add_done_callback(_kill_spawned)
        raise


def _kill_spawned(future: "Future[subprocess.Popen[bytes]]") -> None:
    if future.exception() is None:
        future.result().kill()


@contextlib.asynccontextmanager
async def running(
    command: Sequence[str],
    *,
    pass_sockets: Sequence[socket.socket],
    thp: bool | None = None,
    folder: Path | None = None,
) -> AsyncIterator[Process]:
    """Run QEMU as `command`; it is gone when the context is left, whatever happened.

    The sockets are inherited under their own numbers and closed on this side.

    :param folder: its working directory; None is this process's.

    :raise HostError: when a program is missing.
    """
    with contextlib.ExitStack() as stack:
        for sock in pass_sockets:
            stack.enter_context(sock)
        argv = wrapped(command, thp=thp)
        with private_folder("lab-vm-") as workdir:
            descriptor = os.open(
                workdir / "qemu.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600
            )
            try:
                child = _spawn(argv, descriptor, [sock.fileno() for sock in pass_sockets], folder)
            finally:
                os.close(descriptor)
            stack.close()
            process = Process(child, command, workdir)
            log.debug("started QEMU as process %d: %s", process.pid, command)
            try:
                yield process
            finally:
                # First of all, because it cannot be interrupted: what follows only reaps.
                process.kill()
                if not await process.wait(KILL_GRACE_S):
                    log.error("process %d does not end; the kernel holds it", process.pid)
