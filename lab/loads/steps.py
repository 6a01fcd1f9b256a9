"""Work in the guest that says when it has done a step: a line of a command's output, by ssh.

The command is a loop in the guest, and each line that it prints ends a step.  When the line has
come is noted on this host (`stamper.py`), because the clock of a guest stands still with it.

What is measured: the time from one line to the next, which is that of a step and of its way here:
ssh in the guest, and QEMU's forwarding of the port.  Lines that come together, as after a stop, are
steps of no time: the first of them has waited for all.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from lab.errors import GuestError, LabError, UsageError
from lab.guests.debian.shell import require_ssh, ssh_command
from lab.host.needs import require_setpriv
from lab.host.process import kill_child
from lab.host.tools import log_tail
from lab.host.workdir import private_folder
from lab.loads.load import Load
from lab.loads.table import in_order, request_table

STAMPER = Path(__file__).with_name("stamper.py")
READY_S = 120.0
"""How long each of the commands may take until it prints its first line."""

_MEMORY = Path("/dev/shm")
_STAMP_BYTES = 8
_POLL_S = 0.02
_END_GRACE_S = 5.0

_Read = tuple[list[npt.NDArray[np.int64]], int]
"""The instants of each command's lines, and until when they are all there."""


@dataclass(frozen=True, kw_only=True)
class _Loop:
    """One command that runs, and who notes its lines."""

    command: asyncio.subprocess.Process
    stamper: asyncio.subprocess.Process
    stamps: Path
    said: Path


class StepsLoad(Load):
    """Made by `steps_load`."""

    def __init__(self, what: str, folder: Path) -> None:
        self.what = what
        self._folder = folder
        self._loops: list[_Loop] = []
        self._told_to_end = False
        self._final: _Read | None = None

    @property
    def completed(self) -> int:
        """How many steps are done; the first line of each command begins its first step."""
        if self._final is not None:
            return sum(max(0, len(one) - 1) for one in self._final[0])
        sizes = (loop.stamps.stat().st_size // _STAMP_BYTES for loop in self._loops)
        return sum(max(0, size - 1) for size in sizes)

    @property
    def has_ended(self) -> bool:
        return any(loop.command.returncode is not None for loop in self._loops)

    @property
    def problem(self) -> LabError | None:
        if self._told_to_end:
            return None
        for loop in self._loops:
            if loop.command.returncode is not None:
                said = log_tail(loop.said, lines=1) if loop.said.exists() else ""
                return GuestError(f"{self.what} ended early: {said or 'it said nothing'}")
        return None

    def df(self) -> pd.DataFrame:
        """Return every step so far; see `Load.df`.  The one that each command is in is censored."""
        stamps, until_ns = self._read()
        parts = []
        for client, at_ns in enumerate(stamps):
            if not len(at_ns):
                continue
            done_ns = np.append(at_ns[1:], 0)
            parts.append(
                request_table(
                    due_ns=at_ns,
                    sent_ns=at_ns,
                    done_ns=done_ns,
                    client=np.full(len(at_ns), client, dtype=np.int64),
                    operation=pd.Categorical(["step"] * len(at_ns), categories=["step"]),
                    number=np.zeros(len(at_ns), dtype=np.int64),
                    ok=done_ns != 0,
                    until_ns=until_ns,
                )
            )
        if not parts:
            raise GuestError(f"{self.what} has not done a step yet")
        return in_order(pd.concat(parts, ignore_index=True), until_ns)

    def _read(self) -> _Read:
        if self._final is not None:
            return self._final
        # In this order, so that what is not in the files was not done then.
        until_ns = time.monotonic_ns()
        found = []
        for loop in self._loops:
            data = loop.stamps.read_bytes()
            whole = data[: len(data) // _STAMP_BYTES * _STAMP_BYTES]
            at_ns = np.frombuffer(whole, dtype=np.int64)
            found.append(at_ns[at_ns <= until_ns])
        return found, until_ns

    async def _begin(self, port: int, key: Path, commands: list[str]) -> None:
        for number, command in enumerate(commands):
            await self._start(port, key, command, number)
        deadline = time.monotonic() + READY_S
        while any(loop.stamps.stat().st_size < _STAMP_BYTES for loop in self._loops):
            if self.problem is not None:
                raise self.problem
            if time.monotonic() > deadline:
                raise GuestError(f"{self.what} has not begun within {READY_S:g} s")
            await asyncio.sleep(_POLL_S)

    async def _start(self, port: int, key: Path, command: str, number: int) -> None:
        stamps, said = self._folder / f"stamps.{number}", self._folder / f"said.{number}"
        read_end, write_end = os.pipe()
        try:
            # A session of its own, so that an interrupt at the terminal reaches the lab alone.
            with stamps.open("wb") as out:
                stamper = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-I", "-S", str(STAMPER)),
                    stdin=read_end,
                    stdout=out,
                    start_new_session=True,
                )
            with said.open("wb") as err:
                process = await asyncio.create_subprocess_exec(
                    *(require_setpriv(), "--pdeathsig=KILL", "--"),
                    *ssh_command(port, key, command, READY_S),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=write_end,
                    stderr=err,
                    start_new_session=True,
                )
        finally:
            os.close(read_end)
            os.close(write_end)
        self._loops.append(_Loop(command=process, stamper=stamper, stamps=stamps, said=said))

    async def _end(self) -> None:
        if self._final is not None:
            return
        self._told_to_end = self.problem is None
        for loop in self._loops:
            kill_child(loop.command)
        for loop in self._loops:
            await loop.command.wait()
            try:
                # The pipe has ended with the command.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_END_GRACE_S):
                        await loop.stamper.wait()
            finally:
                kill_child(loop.stamper)
            await loop.stamper.wait()
        self._final = self._read()


@contextlib.asynccontextmanager
async def steps_load(
    what: str, *, port: int, key: Path, commands: list[str]
) -> AsyncIterator[StepsLoad]:
    """Run commands in the lab's Debian while the context lasts, and note when each prints a line.

    It begins when each has printed one.  On the way out ssh ends at once, and a command in the
    guest with the next line that it prints; the table remains.

    :param what: names it in messages.
    :param port: of this host, forwarded to the guest's port 22.
    :param key: root's key (`lab.guests.debian`).
    :param commands: of the guest's shell; each runs for ever, is one client, and must print its
        lines at once, not many together.
    :raise UsageError: no commands.
    :raise HostError: no ssh on this host.
    :raise GuestError: a command does not begin, or, on the way out, it has ended.
    """
    if not commands:
        raise UsageError(f"{what}: no command to run", "give it one at least")
    require_ssh()
    with private_folder("lab-steps-", _MEMORY if _MEMORY.is_dir() else None) as folder:
        load = StepsLoad(what, folder)
        try:
            await load._begin(port, key, commands)
            yield load
            problem = load.problem
        finally:
            await load._end()
    if problem is not None:
        raise problem
