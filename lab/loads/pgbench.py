"""Load on PostgreSQL by its own generator pgbench, transaction by transaction.

pgbench runs on this host.  In Debian it comes with the server, in the package `postgresql`.

What its log says, and what it does not (versions 14 and later):

* The latency of a transaction is in whole microseconds.  With a rate it is counted from when the
  transaction was due, else from when it began.
* The time of a line is not that of the transaction's end: it is read anew when the line is
  written, some microseconds after it.  It is that of the clock CLOCK_MONOTONIC with a constant
  added when pgbench began, which made it seconds since 1970.  The constant is found here by reading
  both clocks just before pgbench begins; `PgbenchLoad.clock_error_ns` says how far that may be
  wrong.
* Only what has ended is in it.  Transactions that never did are not, so no row is censored, and
  those that were due and had not begun when pgbench was ended are not in the table.
* pgbench writes its log by some hundred lines at once.  The table of a load that runs lags behind;
  that of one that has ended is whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from lab.errors import BuildError, GuestError, HostError, LabError, UsageError
from lab.host.needs import require_setpriv
from lab.host.process import kill_child
from lab.host.tools import log_tail, run_tool
from lab.host.workdir import private_folder
from lab.loads.load import Load
from lab.loads.table import request_table
from lab.units import NS_PER_MS, NS_PER_S, NS_PER_US

Script = Literal["tpcb-like", "simple-update", "select-only"]

_DEBIAN = Path("/usr/lib/postgresql")
_WRAPPER = "pg_wrapper"
# The log is no work for the disk that a snapshot is written to.
_MEMORY = Path("/dev/shm")
# So long that it never ends by itself; ended by the signal that ends it when the time is over.
_FOR_EVER_S = 10_000_000
_READY_S = 60.0
_END_GRACE_S = 20.0
_POLL_S = 0.02
# A difference of the clocks that changes by more than this was set, not slewed.
_SET_NS = 1 * NS_PER_MS


def find_pgbench() -> Path:
    """Return the program, of the newest version that there is.

    :raise HostError: it is not installed.
    """
    # Before the PATH: there Debian has a script that asks settings of this user which version to
    # run, and that is there without any, too.
    versions = list(_DEBIAN.glob("*/bin/pgbench"))
    if versions:
        return max(versions, key=lambda path: _version(path.parts[-3]))
    found = shutil.which("pgbench")
    if found is None or Path(found).resolve().name == _WRAPPER:
        raise HostError(
            "pgbench is not installed",
            "install the package postgresql; it makes no server on this host when "
            "/etc/postgresql-common/createcluster.conf has `create_main_cluster = false` before",
        )
    return Path(found)


def _version(name: str) -> float:
    try:
        return float(name)
    except ValueError:
        return 0.0


def _environment(password: str | None) -> dict[str, str]:
    """What pgbench runs with: nothing of this user's own settings for PostgreSQL.

    A password is no argument, because those are for everybody to see.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
    own = {"LC_ALL": "C", "PGCONNECT_TIMEOUT": "30", "PGSSLMODE": "disable"}
    return kept | own | ({"PGPASSWORD": password} if password is not None else {})


def _connection(port: int, user: str) -> list[str]:
    return ["--host=127.0.0.1", f"--port={port}", f"--username={user}"]


async def initialise(
    scale: int,
    *,
    port: int,
    user: str = "lab",
    database: str = "lab",
    password: str | None = None,
) -> None:
    """Make pgbench's tables, of 100,000 rows for each unit of `scale`, some 15 MiB; what was in
    tables of these names is lost.

    :param user: and `database`: by default those that the lab's Debian has for this.
    :raise HostError: pgbench is not installed.
    :raise GuestError: it failed.
    """
    with private_folder("lab-pgbench-") as folder:
        log = folder / "initialise.log"
        try:
            await run_tool(
                [
                    find_pgbench(),
                    "--initialize",
                    f"--scale={scale}",
                    "--quiet",
                    *_connection(port, user),
                    database,
                ],
                log=log,
                env=_environment(password),
            )
        except BuildError as error:
            raise GuestError(
                f"pgbench cannot make its tables at port {port}: {_complaint(log)}"
            ) from error


def _complaint(log: Path) -> str:
    """The first error that pgbench wrote, or else its last words."""
    lines = log.read_text(errors="replace").splitlines()
    errors = (line.split("error: ", 1)[1] for line in lines if "error: " in line)
    return next(errors, log_tail(log, lines=1) or "it said nothing")


def clocks_apart() -> tuple[int, int]:
    """CLOCK_REALTIME less CLOCK_MONOTONIC, and how far that may be wrong, in ns."""
    best: tuple[int, int] | None = None
    for _ in range(10):
        first = time.monotonic_ns()
        real = time.time_ns()
        last = time.monotonic_ns()
        found = real - (first + last) // 2, (last - first + 1) // 2
        best = found if best is None or found[1] < best[1] else best
    assert best is not None
    return best


def parse_log(text: str, apart_ns: int, *, has_rate: bool, until_ns: int) -> pd.DataFrame:
    """Return the table of what pgbench logged; a last line without its end is left out.

    A transaction that failed has no latency in the log: its row has 0, and is not `ok`.

    :param apart_ns: seconds since 1970 of its clock less CLOCK_MONOTONIC, in ns.
    :param has_rate: whether lines have the lag behind the schedule.
    :param until_ns: instant up to which there are lines.
    :raise LabError: a line is not as it should be.
    """
    whole = text[: text.rfind("\n") + 1]
    rows = [line.split(" ") for line in whole.splitlines()]
    wanted = 7 if has_rate else 6
    try:
        if any(len(row) < wanted for row in rows):
            raise ValueError(f"fewer than {wanted} fields in a line")
        client = np.array([int(row[0]) for row in rows], dtype=np.int64)
        ok = np.array([row[2].isdigit() for row in rows], dtype=bool)
        latency = np.array([int(row[2]) if row[2].isdigit() else 0 for row in rows], dtype=np.int64)
        seconds = np.array([int(row[4]) for row in rows], dtype=np.int64)
        micros = np.array([int(row[5]) for row in rows], dtype=np.int64)
        lag = np.array([int(row[6]) if has_rate else 0 for row in rows], dtype=np.int64)
    except ValueError as error:
        raise LabError(f"pgbench's log is not understood: {error}") from error
    done = seconds * NS_PER_S + micros * NS_PER_US - apart_ns
    due = done - latency * NS_PER_US
    return request_table(
        due_ns=due,
        sent_ns=due + np.where(ok, lag, 0) * NS_PER_US,
        done_ns=done,
        client=client,
        operation=pd.Categorical(["transaction"] * len(rows), categories=["transaction"]),
        number=np.zeros(len(rows), dtype=np.int64),
        ok=ok,
        until_ns=until_ns,
    )


class PgbenchLoad(Load):
    """Made by `pgbench_load`."""

    def __init__(self, port: int, folder: Path, *, has_rate: bool) -> None:
        self.what = f"load on PostgreSQL at port {port}"
        self._folder = folder
        self._has_rate = has_rate
        self._process: asyncio.subprocess.Process | None = None
        self._apart_ns = 0
        self._told_to_end = False
        self._end_problem: LabError | None = None
        self._text: str | None = None
        self._until_ns = 0
        self.clock_error_ns = 0
        """How far `due_ns`, `sent_ns` and `done_ns` may be wrong, all together, for the difference
        of the clocks; how late pgbench writes a line comes to that."""

    @property
    def pid(self) -> int:
        """The process id of pgbench."""
        assert self._process is not None
        return self._process.pid

    @property
    def completed(self) -> int:
        """How many transactions are in the log so far; others may have ended."""
        return self._log_text().count("\n")

    @property
    def has_ended(self) -> bool:
        return self._process is None or self._process.returncode is not None

    @property
    def problem(self) -> LabError | None:
        if self._end_problem is not None:
            return self._end_problem
        if self.has_ended and not self._told_to_end:
            return GuestError(f"{self.what}: pgbench ended early: {self._said()}")
        return None

    def df(self) -> pd.DataFrame:
        """Return every transaction that is in the log so far; see `Load.df`.  No row is
        censored.
        """
        text = self._log_text()
        table = parse_log(text, self._apart_ns, has_rate=self._has_rate, until_ns=self._until_ns)
        if self._text is None and len(table):
            table.attrs["until_ns"] = int(table["done_ns"].max())
        return table

    def _log_text(self) -> str:
        if self._text is not None:
            return self._text
        return "".join(path.read_text() for path in sorted(self._folder.glob("transactions.*")))

    def _said(self) -> str:
        return _complaint(self._folder / "said")

    async def _begin(self, command: list[str], environment: Mapping[str, str]) -> None:
        self._apart_ns, self.clock_error_ns = clocks_apart()
        with (self._folder / "said").open("wb") as said:
            # A session of its own, so that an interrupt at the terminal reaches the lab alone.
            self._process = await asyncio.create_subprocess_exec(
                require_setpriv(),
                "--pdeathsig=KILL",
                "--",
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                cwd=self._folder,
                env=dict(environment),
                start_new_session=True,
            )
        deadline = time.monotonic() + _READY_S
        # It reports progress once a second, and not before all its clients are connected.
        while b"progress:" not in (self._folder / "said").read_bytes():
            if self.has_ended:
                raise GuestError(f"{self.what}: {self._said()}")
            if time.monotonic() > deadline:
                raise GuestError(f"{self.what}: pgbench has not begun within {_READY_S:g} s")
            await asyncio.sleep(_POLL_S)
        apart_ns, error_ns = clocks_apart()
        moved_ns = abs(apart_ns - self._apart_ns)
        if moved_ns > _SET_NS:
            raise LabError(
                f"{self.what}: the host's clock was set by {moved_ns / NS_PER_MS:.0f} ms while "
                "pgbench began, so its times are not known",
                "try again",
            )
        self.clock_error_ns = max(self.clock_error_ns, error_ns) + moved_ns

    async def _end(self) -> None:
        process = self._process
        if process is not None and process.returncode is None:
            self._told_to_end = True
            # As when its time is over: it ends the transactions that have begun, and its log.
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGALRM)
            try:
                async with asyncio.timeout(_END_GRACE_S):
                    await process.wait()
            except TimeoutError:
                self._end_problem = GuestError(
                    f"{self.what}: transactions did not end within {_END_GRACE_S:g} s, and the "
                    "last lines of pgbench's log are lost"
                )
            finally:
                kill_child(process)
                status = await process.wait()
            if self._end_problem is None and status:
                self._end_problem = GuestError(f"{self.what}: {self._said()}")
        if self._text is None:
            self._text = self._log_text()
            self._until_ns = time.monotonic_ns()


@contextlib.asynccontextmanager
async def pgbench_load(
    *,
    port: int,
    clients: int = 8,
    rate_per_s: float | None = None,
    script: Script = "tpcb-like",
    user: str = "lab",
    database: str = "lab",
    password: str | None = None,
    seed: int = 1,
) -> AsyncIterator[PgbenchLoad]:
    """Load a PostgreSQL server behind `port` of 127.0.0.1 while the context lasts.

    It begins with pgbench's first report of progress, a second after its clients are connected.  On
    the way out transactions that have begun may end; the table remains.

    :param user: and `database`: by default those that the lab's Debian has for this.
    :param clients: connections, each with one transaction at a time, all in one thread.
    :param rate_per_s: None: a closed loop, each connection begins its next transaction when one has
        ended.  Else transactions are due at distances drawn from an exponential distribution.
    :param script: one of those that pgbench has.
    :param seed: of pgbench's random numbers.
    :raise UsageError: arguments that can never work.
    :raise HostError: pgbench is not installed.
    :raise GuestError: it cannot connect, its tables are missing, or, on the way out, it ended
        early.
    """
    if rate_per_s is not None and not rate_per_s > 0:
        raise UsageError(f"rate_per_s is {rate_per_s}, which is no rate", "give None for none")
    command = [
        str(find_pgbench()),
        f"--client={clients}",
        "--jobs=1",
        f"--time={_FOR_EVER_S}",
        "--no-vacuum",
        f"--builtin={script}",
        "--log",
        "--log-prefix=transactions",
        "--progress=1",
        f"--random-seed={seed}",
        *([f"--rate={rate_per_s}"] if rate_per_s is not None else []),
        *_connection(port, user),
        database,
    ]
    with private_folder("lab-pgbench-", _MEMORY if _MEMORY.is_dir() else None) as folder:
        load = PgbenchLoad(port, folder, has_rate=rate_per_s is not None)
        try:
            await load._begin(command, _environment(password))
            yield load
        finally:
            await load._end()
    if load.problem is not None:
        raise load.problem
