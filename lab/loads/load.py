"""Load on a server behind a TCP port of this host, request by request.

::

    async with redis_load(port=16379, operation="SET", rate_per_s=2000) as load:
        await load.wait_requests(10_000, 60)
        ...                                     # the snapshot
    table = load.df()

The generator is a process of its own (`redis.c`), which ends with the context, and also when this
process is killed.  It writes its records into memory that this process reads, never to a disk.

What is measured: the time from when a request was due until its whole reply has been read, on the
host's CLOCK_MONOTONIC.  It includes the forwarding of the port by QEMU, which is part of what a
user of the service feels, and the time for which the generator's one thread was busy with replies
of other connections or waited for a CPU of the host.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import mmap
import os
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from lab.errors import GuestError, GuestSilentError, LabError, UsageError
from lab.host.compiled import Program, ensure_compiled
from lab.host.process import kill_child
from lab.loads.table import request_table

SOURCE = Path(__file__).with_name("redis.c")
#: The tests add -Werror: a compiler that is newer than this lab may warn about more.
CFLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra")

Operation = Literal["SET", "GET", "MIX"]

END_GRACE_S = 5.0
"""How long a generator may take to end when it is told to."""

_POLL_S = 0.01
_MAGIC = 0x3173696465724C
_HEADER_BYTES = 4096
# `struct header` and `struct record` of redis.c.
_HEADER = np.dtype(
    [
        ("magic", "u8"),
        ("record_bytes", "u8"),
        ("capacity", "u8"),
        ("issued", "u8"),
        ("completed", "u8"),
        ("refused", "u8"),
        ("start_ns", "i8"),
        ("end_ns", "i8"),
        ("cpu_ns", "i8"),
        ("first_error", "S256"),
    ]
)
_RECORD = np.dtype(
    [
        ("due_ns", "i8"),
        ("sent_ns", "i8"),
        ("done_ns", "i8"),
        ("number", "u8"),
        ("client", "u2"),
        ("operation", "u1"),
        ("status", "u1"),
        ("unused", "u4"),
    ]
)
# `enum operation`.
_OP_SET = 2
_OPERATIONS = ("SET", "GET")
_GET_PERCENT = {"SET": 0, "GET": 100, "MIX": 50}


Records = npt.NDArray[np.void]


class Load(abc.ABC):
    """A load generator that runs, and then what it has written down."""

    what: str
    """Names it in messages."""

    @abc.abstractmethod
    def df(self) -> pd.DataFrame:
        """Return every request so far, in the order in which they were due.

        Columns: `due_ns`, `sent_ns`, `done_ns`, `latency_ns`, `client`, `operation`, `number`,
        `ok`, `censored`; `lab.loads.table.TABLE` says what each means.  May be called while the
        load runs and after it.
        """

    @property
    @abc.abstractmethod
    def completed(self) -> int:
        """How many requests have been answered since the load began, also by errors."""

    @property
    @abc.abstractmethod
    def problem(self) -> LabError | None:
        """Why the load cannot be relied upon, or None: it ended early, or the server refused
        requests.
        """

    @property
    @abc.abstractmethod
    def has_ended(self) -> bool:
        """Whether the generator is gone."""

    async def wait_requests(self, n: int, timeout_s: float) -> None:
        """Wait until `n` requests in all have been answered since the load began.

        :raise GuestError: the load ended before that, or the server refused a request.
        :raise GuestSilentError: the time is over.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            # In this order: what ended may have completed its last requests just before.
            ended = self.has_ended
            if self.problem is not None:
                raise self.problem
            if self.completed >= n:
                return
            if ended:
                raise GuestError(f"{self.what} ended after {self.completed} of {n} requests")
            if time.monotonic() > deadline:
                raise GuestSilentError(
                    f"{self.what}: {self.completed} of {n} requests answered within {timeout_s:g} s"
                )
            await asyncio.sleep(_POLL_S)


class RedisLoad(Load):
    """Made by `redis_load`."""

    def __init__(self, port: int, capacity: int, rate_per_s: float | None) -> None:
        self.what = f"load on Redis at port {port}"
        self._memory = os.memfd_create("lab-load", os.MFD_CLOEXEC)
        self._capacity = capacity
        self._rate_per_s = rate_per_s
        self._map: mmap.mmap | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._following: asyncio.Task[None] | None = None
        self._said: LabError | None = None
        self._final: tuple[np.void, Records, int] | None = None
        self.start_ns = 0
        """CLOCK_MONOTONIC when the load began."""

    @property
    def pid(self) -> int:
        """The process id of the generator."""
        assert self._process is not None
        return self._process.pid

    @property
    def cpu_ns(self) -> int:
        """CPU time that the generator has used since the load began; 0 while it runs."""
        return int(self._header()["cpu_ns"])

    @property
    def completed(self) -> int:
        return int(self._header()["completed"])

    @property
    def refused(self) -> int:
        """How many requests the server answered with an error."""
        return int(self._header()["refused"])

    @property
    def first_error(self) -> str:
        """The first error that the server answered with, as it was; empty without one."""
        return bytes(self._header()["first_error"]).decode()

    @property
    def has_ended(self) -> bool:
        # What it said last is known then, too.
        return self._following is None or self._following.done()

    @property
    def problem(self) -> LabError | None:
        if self._said is not None:
            return self._said
        if self.refused:
            return GuestError(
                f"{self.what}: the server refused {self.refused} of {self.completed} requests, "
                f'first with "{self.first_error}"'
            )
        return None

    def df(self) -> pd.DataFrame:
        """Return every request so far; see `Load.df`.  Requests that wait for a free connection are
        in it.
        """
        _, records, until_ns = self._read()
        return request_table(
            due_ns=records["due_ns"],
            sent_ns=records["sent_ns"],
            done_ns=records["done_ns"],
            client=records["client"].astype(np.int64),
            operation=pd.Categorical.from_codes(
                records["operation"].astype(np.int8) - _OP_SET, pd.Index(_OPERATIONS)
            ),
            number=records["number"].astype(np.int64),
            # The reply may have come between the copies of two fields.
            ok=(records["status"] == 1) & (records["done_ns"] != 0),
            until_ns=until_ns,
        )

    def _header(self) -> np.void:
        if self._final is not None:
            return self._final[0]
        assert self._map is not None
        header: np.void = np.frombuffer(self._map, dtype=_HEADER, count=1)[0].copy()
        return header

    def _read(self) -> tuple[np.void, Records, int]:
        """Header, records, and an instant: what is not done in the records was not done then."""
        if self._final is not None:
            return self._final
        assert self._map is not None
        # In this order, so that every request in the records was due at that instant.
        header = self._header()
        until_ns = int(header["end_ns"]) or time.monotonic_ns()
        count = int(header["issued"])
        if self._rate_per_s and count:
            # A generator that waits for a CPU notes late what has become due.
            until_ns = min(until_ns, self.start_ns + int(count * 1e9 / self._rate_per_s))
        records = np.frombuffer(self._map, dtype=_RECORD, count=count, offset=_HEADER_BYTES).copy()
        return header, records, until_ns

    async def _begin(self, program: Program, arguments: Sequence[str]) -> None:
        """Start the generator and wait until it says that it is ready."""
        # A session of its own, so that an interrupt at the terminal reaches the lab alone.
        self._process = await asyncio.create_subprocess_exec(
            program.path,
            f"records=/proc/self/fd/{self._memory}",
            f"max_requests={self._capacity}",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
            pass_fds=[self._memory],
        )
        word, rest = await self._line()
        if word != "ready":
            # A forwarded port takes connections also while nobody in the guest does.
            not_yet = "before it answered" in rest
            raise GuestError(
                f"{self.what}: {rest or 'the generator died'}",
                "wait until the server in the guest is up" if not_yet else "",
            )
        self.start_ns = int(rest)
        size = _HEADER_BYTES + self._capacity * _RECORD.itemsize
        self._map = mmap.mmap(self._memory, size, prot=mmap.PROT_READ)
        assert int(self._header()["magic"]) == _MAGIC
        assert int(self._header()["record_bytes"]) == _RECORD.itemsize
        self._following = asyncio.create_task(self._follow(), name=self.what)

    async def _line(self) -> tuple[str, str]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = (await self._process.stdout.readline()).decode(errors="replace").strip()
        word, _, rest = line.partition(" ")
        return word, rest

    async def _follow(self) -> None:
        """Wait for the generator's last word, and note a problem."""
        word, rest = await self._line()
        assert self._process is not None
        await self._process.wait()
        if word == "error":
            self._said = GuestError(f"{self.what}: {rest}")
        elif (word, rest) == ("end", "full"):
            self._said = UsageError(
                f"{self.what}: it ended after {self._capacity} requests, for which it had memory",
                "give it a higher max_requests",
            )
        elif word != "end":
            self._said = LabError(
                f"{self.what}: the generator ended with status {self._process.returncode}"
            )

    async def end(self) -> None:
        """End the generator now, and keep what it has written; leaving the context does it, too."""
        process = self._process
        if process is not None and process.returncode is None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(END_GRACE_S):
                        await process.wait()
            finally:
                kill_child(process)
            await process.wait()
        if self._following is not None:
            await self._following
        if self._map is not None:
            self._final = self._read()
            self._map.close()
            self._map = None
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1


@contextlib.asynccontextmanager
async def redis_load(
    *,
    port: int,
    operation: Operation = "SET",
    clients: int = 50,
    rate_per_s: float | None = None,
    value_bytes: int = 100,
    keys: int = 100_000,
    seed: int = 1,
    sequence: int | None = None,
    fill: bool = False,
    seconds: float | None = None,
    max_requests: int = 5_000_000,
    ready_s: float = 30,
) -> AsyncIterator[RedisLoad]:
    """Load a Redis server behind `port` of 127.0.0.1 while the context lasts.

    It begins when each connection has had an answer to a PING.  On the way out the generator ends
    at once: requests that have no reply then are censored.  The table remains.

    :param operation: "MIX" is SET and GET, drawn with even odds.
    :param clients: connections, each with one request at a time.
    :param rate_per_s: None: a closed loop, each connection sends its next request when its reply
        has come.  Else requests are due at even distances, whatever the server does.
    :param value_bytes: noise, another one for each request.
    :param keys: the key of each request is drawn evenly from so many.
    :param seed: of keys, values and operations.
    :param sequence: instead of all that, each connection writes a key of its own, `lab:` and its
        index, with numbers that count up by 1 and begin here; `number` in the table names them.
    :param fill: write every key once before the load begins.
    :param seconds: end by itself after so long.
    :param max_requests: a bound of the memory, 40 bytes for each request; the load ends there,
        which is a problem.
    :param ready_s: how long the connections may take until each has an answer.
    :raise UsageError: arguments that can never work.
    :raise HostError: no C compiler.
    :raise BuildError: the generator could not be compiled.
    :raise GuestError: nothing listens, the server does not answer as Redis does, or, on the way
        out, the connection was lost or the server refused requests.
    """
    _check(operation, sequence, rate_per_s)
    program = await ensure_compiled(SOURCE, CFLAGS, "the load generator")
    arguments = {
        "port": port,
        "clients": clients,
        "keys": keys,
        "value_bytes": value_bytes,
        "seed": seed,
        "get_percent": _GET_PERCENT[operation],
        "sequence": sequence or 0,
        "fill": int(fill),
        "rate": rate_per_s or 0,
        "seconds": seconds or 0,
        "ready_s": ready_s,
    }
    load = RedisLoad(port, max_requests, rate_per_s)
    try:
        await load._begin(program, [f"{key}={value}" for key, value in arguments.items()])
        yield load
    finally:
        await load.end()
    if load.problem is not None:
        raise load.problem


def _check(operation: str, sequence: int | None, rate_per_s: float | None) -> None:
    if operation not in _GET_PERCENT:
        raise UsageError(f"operation {operation} is none of {', '.join(_GET_PERCENT)}")
    if sequence is not None and (sequence < 1 or operation != "SET"):
        raise UsageError("a sequence begins at 1 or more, and its operation is SET")
    if rate_per_s is not None and not rate_per_s > 0:
        raise UsageError(f"rate_per_s is {rate_per_s}, which is no rate", "give None for none")
