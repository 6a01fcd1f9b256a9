"""The load on Redis: every request is in the table once, and waiting is part of its latency.

Times are compared with each other, never with what they ought to be.
"""

from pathlib import Path

import pandas as pd
import pytest

from lab.host.compiled import COMPILERS
from lab.host.tools import find_compiler, run_tool
from lab.loads.load import CFLAGS, SOURCE, redis_load
from lab.loads.table import COLUMNS
from tests.unit.loads.conftest import Ask, Server

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
