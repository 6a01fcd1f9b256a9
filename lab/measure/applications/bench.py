"""The lab's Debian with a server that answers, and the load on it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lab.analysis.requests import df_progress
from lab.errors import GuestError
from lab.guests.debian.build import key_of
from lab.loads.load import Load, Operation, redis_load
from lab.loads.pgbench import PgbenchLoad, initialise, pgbench_load
from lab.loads.steps import StepsLoad, steps_load
from lab.measure.applications.ask import connected_redis, wait_for_redis
from lab.measure.applications.steps import STEPS
from lab.measure.settle import SETTLE_LIMIT_S, SETTLE_SHARE, SETTLE_WINDOW_S, is_settled
from lab.scenario.applications import PORTS, ApplicationsPlan
from lab.scenario.methods import Variant
from lab.session import VM, boot
from lab.units import NS_PER_S

BOOT_S = 300.0
"""How long Debian may take until its servers answer: a busy host makes half a minute many."""

ROLE = "lab"
"""PostgreSQL's role and database in the lab's Debian."""

RATE_S = 3.0
"""How long a load as fast as it can runs to find the rate that half of is asked for."""

Times = npt.NDArray[np.int64]

_POLL_S = 0.02
# pgbench writes its log by many lines at once, so whether its rate is even shows only afterwards;
# and a step may take so long that there are few in a second.
_FIXED_SETTLE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A guest whose server answers.  Made by `booted_bench`.

    :param rate_per_s: what an open loop asks for; None: a closed loop.
    """

    vm: VM
    plan: ApplicationsPlan
    rate_per_s: float | None = None

    @property
    def port(self) -> int:
        """The port of this host that leads to the server."""
        return self.vm.ports[PORTS[self.plan.served.server]]

    @property
    def _key(self) -> Path:
        key = key_of(Path(self.vm.machine.image[0]))
        assert key is not None
        return key

    @contextlib.asynccontextmanager
    async def load(self, seed: int, rate_per_s: float | None = None) -> AsyncIterator[Load]:
        """Load the server while the context lasts; the table remains.

        :raise LabError: what `redis_load` and `pgbench_load` raise.
        """
        plan = self.plan
        if plan.served.server == "postgresql":
            async with pgbench_load(
                port=self.port, clients=plan.connections, user=ROLE, database=ROLE, seed=seed
            ) as pgbench:
                yield pgbench
            return
        if plan.served.server == "shell":
            commands = [STEPS[plan.application].loop(k) for k in range(plan.connections)]
            async with steps_load(
                plan.served.title, port=self.port, key=self._key, commands=commands
            ) as steps:
                yield steps
            return
        operation: Operation = "GET" if plan.application == "redis-get" else "SET"
        async with redis_load(
            port=self.port,
            operation=operation,
            clients=plan.connections,
            rate_per_s=rate_per_s,
            keys=plan.keys,
            value_bytes=plan.value_bytes,
            seed=seed,
            ready_s=ANSWER_ALL_S,
        ) as redis:
            yield redis


ANSWER_ALL_S = 60.0
"""How long all connections may take to have an answer."""


async def settle_load(load: Load, rate_per_s: float | None = None) -> str | None:
    """Wait until requests are answered at an even rate; return a warning when they never are.

    :param rate_per_s: of an open loop: and not faster than they are asked for, as what has been
        late since the load began is still worked off then.
    """
    if isinstance(load, PgbenchLoad | StepsLoad):
        await asyncio.sleep(_FIXED_SETTLE_S)
        return None
    began = time.monotonic_ns()
    t_ns, ops = [began], [load.completed]
    while t_ns[-1] - began < SETTLE_LIMIT_S * NS_PER_S:
        await asyncio.sleep(_POLL_S)
        if load.problem is not None:
            raise load.problem
        t_ns.append(time.monotonic_ns())
        ops.append(load.completed)
        times, done = np.array(t_ns, dtype=np.int64), np.array(ops, dtype=np.int64)
        if is_settled(times, done) and not is_late(times, done, rate_per_s):
            return None
    return (
        f"the rate of requests had not settled to within {SETTLE_SHARE:.0%} after "
        f"{SETTLE_LIMIT_S:g} s"
    )


def is_late(t_ns: Times, ops: Times, rate_per_s: float | None) -> bool:
    """Whether more is done in the last window than is asked for in it."""
    if rate_per_s is None:
        return False
    first_ns = t_ns[-1] - round(SETTLE_WINDOW_S * NS_PER_S)
    done = float(ops[-1] - np.interp(first_ns, t_ns, ops))
    return done > rate_per_s * SETTLE_WINDOW_S * (1 + SETTLE_SHARE)


@contextlib.asynccontextmanager
async def booted_bench(plan: ApplicationsPlan, variant: Variant) -> AsyncIterator[Bench]:
    """Boot the lab's Debian and make its server ready for the load of `plan`.

    :raise HostError: Debian is not built, or the host lacks something.
    :raise GuestError: the server does not do what it is asked for.
    """
    async with boot(plan.machine, binary=variant) as vm:
        # What else starts is done then, too; "degraded" is some service that this does not need.
        await vm.shell("systemctl is-system-running --wait || true", timeout_s=BOOT_S)
        bench = Bench(vm=vm, plan=plan)
        if plan.served.server == "redis":
            await wait_for_redis(bench.port, BOOT_S)
            await _fill(bench)
        elif plan.served.server == "shell":
            for client in range(plan.connections):
                await vm.shell(STEPS[plan.application].prepare(client), timeout_s=BOOT_S)
        else:
            await vm.shell("until pg_isready -q; do sleep 1; done", timeout_s=BOOT_S)
            await initialise(plan.scale, port=bench.port, user=ROLE, database=ROLE)
        # So that the guest writes to its disk nothing that is not of the load.
        await vm.shell("sync", timeout_s=BOOT_S)
        if plan.application == "redis-set-half":
            bench = Bench(vm=vm, plan=plan, rate_per_s=await _half_rate(bench))
        yield bench


async def _fill(bench: Bench) -> None:
    async with connected_redis(bench.port) as redis:
        await redis.fill(bench.plan.keys, bench.plan.value_bytes)
        if bench.plan.application != "redis-set-aof":
            return
        await redis.ask("CONFIG", "SET", "appendfsync", "everysec")
        # Else the server writes its log anew when it has grown, at some time.
        await redis.ask("CONFIG", "SET", "auto-aof-rewrite-percentage", 0)
        await redis.ask("CONFIG", "SET", "appendonly", "yes")
        end = time.monotonic() + BOOT_S
        while True:
            told = await redis.persistence()
            waits = told.get("aof_rewrite_in_progress"), told.get("aof_rewrite_scheduled")
            if waits == ("0", "0"):
                return
            if time.monotonic() > end:
                raise GuestError(f"Redis has not begun its log of writes within {BOOT_S:g} s")
            await asyncio.sleep(0.2)


async def _half_rate(bench: Bench) -> float:
    """Half of the requests a second that the server answers when asked as fast as it can."""
    async with bench.load(bench.plan.seed) as load:
        await settle_load(load)
        first_ns = time.monotonic_ns()
        await asyncio.sleep(RATE_S)
    done = df_progress(load.df())
    t_ns, ops = done["t_ns"].to_numpy(), done["ops"].to_numpy()
    count = float(np.interp(t_ns[-1], t_ns, ops) - np.interp(first_ns, t_ns, ops))
    return round(count / int(t_ns[-1] - first_ns) * NS_PER_S / 2, 1)
