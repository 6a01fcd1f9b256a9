"""The load on Redis: every request is in the table once, and waiting is part of its latency.

Times are compared with each other, never with what they ought to be.
"""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest

from lab.errors import GuestError, GuestSilentError, UsageError
from lab.host.compiled import COMPILERS
from lab.host.tools import find_compiler, run_tool
from lab.loads.load import CFLAGS, SOURCE, redis_load
from lab.loads.table import COLUMNS
from tests.support.paths import ROOT
from tests.unit.loads.conftest import Ask, Server, free_port, stopped, wait_state

MS = 1_000_000


async def test_it_compiles_without_a_warning(tmp_path: Path) -> None:
    strict = ["-Werror", "-Wpedantic", "-Wshadow"]
    compiler = find_compiler(COMPILERS, "a test", "install gcc")
    command: list[str | Path] = [compiler, *CFLAGS, *strict, "-o", tmp_path / "redis", SOURCE]
    await run_tool(command, log=tmp_path / "log")


def check_table(table: pd.DataFrame) -> None:
    """What holds for every table of requests."""
    assert list(table.columns) == list(COLUMNS)
    assert table["due_ns"].is_monotonic_increasing
    done = table[~table["censored"]]
    assert (done["latency_ns"] == done["done_ns"] - done["due_ns"]).all()
    assert (done["sent_ns"] >= done["due_ns"]).all()
    assert (done["done_ns"] > done["sent_ns"]).all()
    waiting = table[table["censored"]]
    assert waiting["done_ns"].isna().all()
    assert not waiting["ok"].any()
    assert (waiting["latency_ns"] >= 0).all()
    # A connection has one request at a time.
    for _, own in table[table["sent_ns"].notna()].groupby("client"):
        ordered = own.sort_values("sent_ns")
        ended = ordered["done_ns"].to_numpy()[:-1]
        assert (ordered["sent_ns"].to_numpy()[1:] >= ended).all()


@pytest.mark.parametrize("rate", [None, 4000])
async def test_the_server_counts_as_many_requests_as_the_table(
    redis: Server, ask: Ask, rate: float | None
) -> None:
    async with redis_load(port=redis.port, clients=7, rate_per_s=rate, keys=30) as load:
        await load.wait_requests(2000, 60)
        check_table(load.df())
    table = load.df()
    check_table(table)
    assert load.completed == (~table["censored"]).sum() >= 2000
    assert table.loc[~table["censored"], "ok"].all()
    stats = ask("INFO", "commandstats").decode()
    (line,) = [line for line in stats.splitlines() if line.startswith("cmdstat_set:")]
    calls = int(line.split("calls=")[1].split(",")[0])
    # A request that was on its way at the end may have reached the server.
    assert load.completed <= calls <= table["sent_ns"].notna().sum()
    assert set(table["client"].dropna()) == set(range(7))
    assert ask("DBSIZE") == b":30"


@pytest.mark.parametrize("operation", ["SET", "GET", "MIX"])
async def test_it_asks_for_what_it_is_told_to(
    redis: Server, ask: Ask, operation: Literal["SET", "GET", "MIX"]
) -> None:
    async with redis_load(
        port=redis.port, operation=operation, clients=5, keys=12, value_bytes=300, fill=True
    ) as load:
        await load.wait_requests(500, 60)
    table = load.df()
    wanted = {"SET": {"SET"}, "GET": {"GET"}, "MIX": {"SET", "GET"}}[operation]
    assert set(table["operation"]) == wanted
    assert table["ok"].sum() == load.completed
    # `fill` has written each key once, before the load.
    assert ask("DBSIZE") == b":12"
    assert len(ask("GET", "lab:key:000000000011")) == 300


@pytest.mark.parametrize("value_bytes", [1, 3_000_000])
async def test_values_of_any_length_are_written_and_read(
    redis: Server, ask: Ask, value_bytes: int
) -> None:
    # The longest ones do not fit into a socket's buffer.
    for operation in ("SET", "GET"):
        async with redis_load(
            port=redis.port, operation=operation, clients=2, keys=1, value_bytes=value_bytes
        ) as load:
            await load.wait_requests(5, 60)
    assert len(ask("GET", "lab:key:000000000000")) == value_bytes


SORTED_KEYS = "local k = redis.call('KEYS', '*') table.sort(k) return table.concat(k, ' ')"


async def test_the_same_seed_writes_the_same_keys_and_the_bound_ends_the_load(
    redis: Server, ask: Ask
) -> None:
    async def load_until_full(seed: int) -> None:
        async with redis_load(
            port=redis.port, clients=1, keys=10**9, seed=seed, max_requests=50
        ) as load:
            await load.wait_requests(51, 60)

    async def keys(seed: int) -> bytes:
        ask("FLUSHALL")
        with pytest.raises(UsageError, match="ended after 50 requests"):
            await load_until_full(seed)
        return ask("EVAL", SORTED_KEYS, "0")

    first = await keys(3)
    assert len(first.split()) == 50
    assert await keys(3) == first
    assert await keys(4) != first


async def test_it_ends_by_itself_when_its_seconds_are_over(redis: Server) -> None:
    async with redis_load(port=redis.port, clients=2, rate_per_s=1000, seconds=0.2) as load:
        with pytest.raises(GuestError, match="ended after"):
            await load.wait_requests(10**9, 60)
    table = load.df()
    # Requests are due at even distances, from the beginning on until the end.
    assert set(np.diff(table["due_ns"])) == {MS}
    assert table["due_ns"].iloc[0] == load.start_ns
    assert 0 <= table.attrs["until_ns"] - table["due_ns"].iloc[-1] < MS
    assert table.attrs["until_ns"] - load.start_ns >= 200 * MS


async def test_open_loop_what_was_due_while_the_server_stood_still_has_waited(
    redis: Server,
) -> None:
    async with redis_load(port=redis.port, clients=4, rate_per_s=2000) as load:
        await load.wait_requests(200, 60)
        with stopped(redis.pid):
            first = time.monotonic_ns()
            await asyncio.sleep(0.2)
            while (while_stopped := load.df())["due_ns"].max() < first + 100 * MS:
                await asyncio.sleep(0.01)
            last = time.monotonic_ns()
        await load.wait_requests(len(while_stopped) + 200, 60)
    table = load.df()
    check_table(while_stopped)
    check_table(table)
    # Of what became due meanwhile no request is left out, ...
    meanwhile = table[table["due_ns"].between(first, last)]
    assert (np.diff(table["due_ns"]) == MS // 2).all()
    assert abs(len(meanwhile) - (last - first) / (MS / 2)) <= 1
    # ... each has waited until the server went on, ...
    assert (meanwhile["done_ns"] >= last).all()
    assert (meanwhile["latency_ns"] >= last - meanwhile["due_ns"]).all()
    # ... and all but one for each connection here, and not with the server.
    assert (meanwhile["sent_ns"] < last).sum() <= 4
    # Before they were done the table had them, too.
    seen = while_stopped[while_stopped["due_ns"] >= first]
    assert seen["censored"].all()
    assert len(seen) >= 199
    assert while_stopped["sent_ns"].isna().sum() >= len(seen) - 4
    assert (seen["due_ns"] + seen["latency_ns"] == while_stopped.attrs["until_ns"]).all()


async def test_closed_loop_the_requests_under_way_waited_and_no_other_was_made(
    redis: Server,
) -> None:
    async with redis_load(port=redis.port, clients=6) as load:
        await load.wait_requests(200, 60)
        with stopped(redis.pid):
            # Now it has read what the server had answered before, and 6 requests are under way.
            wait_state(load.pid, "S")
            first = time.monotonic_ns()
            await asyncio.sleep(0.1)
            last = time.monotonic_ns()
        await load.wait_requests(load.completed + 200, 60)
    table = load.df()
    check_table(table)
    done = table["done_ns"].fillna(2**62)
    under_way = table[(table["due_ns"] < last) & (done > first)]
    assert len(under_way) == 6
    assert (under_way["due_ns"] < first).all()
    assert (under_way["done_ns"] > last).all()
    # Each request begins when the connection's last one was done.
    for _, own in table.groupby("client"):
        assert (own["due_ns"].to_numpy()[1:] == own["done_ns"].to_numpy()[:-1]).all()


async def test_what_has_no_answer_when_the_load_ends_is_censored(redis: Server) -> None:
    async with redis_load(port=redis.port, clients=3) as load:
        await load.wait_requests(50, 60)
        with stopped(redis.pid):
            await asyncio.sleep(0.1)
            await load.end()
    table = load.df()
    check_table(table)
    assert table["censored"].sum() == 3
    assert load.cpu_ns > 0
    assert load.has_ended


@pytest.mark.parametrize("rate", [None, 3000])
async def test_a_sequence_counts_up_and_the_server_has_what_was_acknowledged(
    redis: Server, ask: Ask, rate: float | None
) -> None:
    async with redis_load(port=redis.port, clients=5, sequence=7, rate_per_s=rate) as load:
        await load.wait_requests(1000, 60)
        with stopped(redis.pid):
            await asyncio.sleep(0.05)
    table = load.df()
    assert table["ok"].sum() >= 1000
    sent = table[table["sent_ns"].notna()]
    for client, own in sent.groupby("client"):
        numbers = own.sort_values("sent_ns")["number"].to_numpy()
        assert (numbers == np.arange(7, 7 + len(numbers))).all()
        kept = int(ask("GET", f"lab:{client}"))
        acknowledged = own.loc[own["ok"], "number"].max()
        assert acknowledged <= kept <= numbers[-1]
    assert (table.loc[table["sent_ns"].isna(), "number"] == 0).all()
    assert ask("DBSIZE") == b":5"


@pytest.mark.parametrize("redis_options", [["--maxmemory", "1mb"]])
async def test_requests_that_the_server_refuses_are_counted_and_named(redis: Server) -> None:
    async def load_too_much() -> None:
        async with redis_load(port=redis.port, clients=3, value_bytes=100_000) as load:
            try:
                await load.wait_requests(300, 60)
            finally:
                while load.completed < 300:
                    await asyncio.sleep(0.01)
                await load.end()
                table = load.df()
                check_table(table)
                answered = table[~table["censored"]]
                assert (~answered["ok"]).sum() == load.refused > 0

    with pytest.raises(GuestError, match=r"refused \d+ of \d+ requests, first with \"-OOM"):
        await load_too_much()


async def test_a_server_that_goes_away_is_a_problem(redis: Server, ask: Ask) -> None:
    async def load_until_it_goes() -> None:
        async with redis_load(port=redis.port, clients=3) as load:
            await load.wait_requests(10, 60)
            os.kill(redis.pid, signal.SIGKILL)
            await load.wait_requests(10**9, 60)

    with pytest.raises(GuestError, match=r"after \d+ requests"):
        await load_until_it_goes()


async def test_the_time_for_requests_is_bounded(redis: Server) -> None:
    async with redis_load(port=redis.port, clients=1, rate_per_s=1) as load:
        with pytest.raises(GuestSilentError, match="of 1000 requests answered within"):
            await load.wait_requests(1000, 0.05)


async def test_a_port_where_nothing_listens_is_one_clear_line() -> None:
    port = free_port()
    with pytest.raises(GuestError) as caught:
        async with redis_load(port=port):
            pass
    assert str(caught.value) == f"load on Redis at port {port}: nothing listens there"


@pytest.mark.parametrize(
    "arguments",
    [{"operation": "DEL"}, {"rate_per_s": 0}, {"sequence": 0}, {"sequence": 1, "operation": "GET"}],
)
async def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        async with redis_load(port=1, **arguments):
            pass


@pytest.mark.parametrize(
    "arguments",
    [{"clients": 0}, {"keys": 2**40}, {"value_bytes": -1}, {"seed": "one"}, {"ready_s": -1}],
)
async def test_what_the_program_cannot_use_is_one_clear_line(arguments: dict[str, Any]) -> None:
    (key,) = arguments
    with pytest.raises(GuestError, match=f"{key}=.* is not a number from"):
        async with redis_load(port=1, **arguments):
            pass


OWNER = """
import asyncio, sys
from lab.loads.load import redis_load
async def main():
    async with redis_load(port=int(sys.argv[1]), clients=2) as load:
        print(load.pid, flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


async def test_it_ends_when_its_owner_is_killed(redis: Server) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, str(redis.port), stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    pid = int(await process.stdout.readline())
    assert not is_gone(pid)
    process.kill()
    await process.wait()
    while not is_gone(pid):
        await asyncio.sleep(0.01)


async def test_a_cancelled_load_is_gone(redis: Server) -> None:
    pids = []

    async def load_for_ever() -> None:
        async with redis_load(port=redis.port, clients=2) as load:
            pids.append(load.pid)
            await asyncio.sleep(600)

    task = asyncio.create_task(load_for_ever())
    while not pids:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert is_gone(pids[0])
