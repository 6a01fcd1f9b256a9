"""The load on PostgreSQL: pgbench's log is read as what it is."""

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lab.errors import GuestError, HostError, LabError, UsageError
from lab.loads import pgbench
from lab.loads.pgbench import clocks_apart, find_pgbench, initialise, parse_log, pgbench_load
from lab.loads.table import COLUMNS
from tests.unit.loads.conftest import Server, free_port, stopped

ROLE: Any = {"user": "postgres", "database": "postgres"}
APART_NS = 1_700_000_000 * 10**9


def test_a_line_of_the_log_is_a_row() -> None:
    text = "3 1 2500 0 1700000100 250000\n0 1 1000 0 1700000100 249000\n"
    table = parse_log(text, APART_NS, has_rate=False, until_ns=101 * 10**9)
    assert list(table.columns) == list(COLUMNS)
    assert table["client"].tolist() == [3, 0]
    assert table["done_ns"].tolist() == [100_250_000_000, 100_249_000_000]
    assert table["latency_ns"].tolist() == [2_500_000, 1_000_000]
    assert table["due_ns"].tolist() == [100_247_500_000, 100_248_000_000]
    assert table["sent_ns"].tolist() == table["due_ns"].tolist()
    assert table["ok"].all()
    assert not table["censored"].any()


def test_with_a_rate_a_transaction_begins_its_lag_after_it_was_due() -> None:
    text = "3 1 2500 0 1700000100 250000 2100\n"
    table = parse_log(text, APART_NS, has_rate=True, until_ns=101 * 10**9)
    assert table["due_ns"].tolist() == [100_247_500_000]
    assert table["sent_ns"].tolist() == [100_249_600_000]


def test_a_failed_transaction_is_not_ok_and_a_line_that_is_not_whole_is_left_out() -> None:
    text = "0 1 1000 0 1700000100 0\n0 2 failed 0 1700000100 5\n0 3 1000 0 17000001"
    table = parse_log(text, APART_NS, has_rate=False, until_ns=101 * 10**9)
    assert table["ok"].tolist() == [True, False]
    assert table["latency_ns"].tolist() == [1_000_000, 0]


def test_an_empty_log_is_an_empty_table() -> None:
    assert len(parse_log("", APART_NS, has_rate=False, until_ns=1)) == 0


@pytest.mark.parametrize("text", ["0 1 1000 0\n", "0 1 1000 0 then 5\n", "0 1 1000 0 17 5\n"])
def test_a_log_that_is_something_else_is_refused(text: str) -> None:
    with pytest.raises(LabError, match="not understood"):
        parse_log(text, APART_NS, has_rate=True, until_ns=1)


def test_the_clocks_are_as_far_apart_as_they_say() -> None:
    apart_ns, error_ns = clocks_apart()
    first = time.monotonic_ns()
    real = time.time_ns()
    last = time.monotonic_ns()
    # The system's clock may be slewed by 0.05 %.
    slack = error_ns + 1_000_000
    assert first - slack <= real - apart_ns <= last + slack


def test_without_pgbench_one_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(pgbench, "_DEBIAN", tmp_path)
    with pytest.raises(HostError, match="install the package postgresql"):
        find_pgbench()
    # Debian's script, which is there without the program, too.
    (tmp_path / "pg_wrapper").touch(mode=0o755)
    (tmp_path / "pgbench").symlink_to("pg_wrapper")
    with pytest.raises(HostError, match="install the package postgresql"):
        find_pgbench()


def test_one_on_the_path_is_taken_where_debian_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(pgbench, "_DEBIAN", tmp_path)
    (tmp_path / "pgbench").touch(mode=0o755)
    assert find_pgbench() == tmp_path / "pgbench"


def test_the_newest_version_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(pgbench, "_DEBIAN", tmp_path)
    for version in ("9.6", "15", "17"):
        (tmp_path / version / "bin").mkdir(parents=True)
        (tmp_path / version / "bin" / "pgbench").touch()
    assert find_pgbench() == tmp_path / "17" / "bin" / "pgbench"


@pytest.fixture(scope="module")
def has_pgbench() -> None:
    try:
        find_pgbench()
    except HostError as error:
        pytest.skip(str(error))


@pytest.fixture
async def tables(postgres: Server, has_pgbench: None) -> Server:
    """A server with pgbench's tables."""
    await initialise(1, port=postgres.port, **ROLE)
    return postgres


@pytest.mark.parametrize("rate", [None, 200])
async def test_every_transaction_of_the_log_is_in_the_table_within_the_time_of_the_load(
    tables: Server, rate: float | None
) -> None:
    before = time.monotonic_ns()
    async with pgbench_load(port=tables.port, **ROLE, clients=3, rate_per_s=rate) as load:
        await load.wait_requests(100, 60)
        running = load.df()
    after = time.monotonic_ns()
    table = load.df()
    slack = load.clock_error_ns + 1_000
    assert len(table) == load.completed >= len(running) >= 100
    assert set(table["client"]) == {0, 1, 2}
    assert table["ok"].all()
    assert (table["sent_ns"] >= table["due_ns"]).all()
    assert (table["done_ns"] >= table["sent_ns"]).all()
    assert table["due_ns"].min() >= before - slack
    assert table["done_ns"].max() <= after + slack
    assert table.attrs["until_ns"] >= table["done_ns"].max() - slack


async def test_with_a_rate_what_was_due_while_the_server_stood_still_has_waited(
    tables: Server,
) -> None:
    async with pgbench_load(port=tables.port, **ROLE, clients=2, rate_per_s=300) as load:
        await load.wait_requests(50, 60)
        with stopped(*processes_of(tables)):
            first = time.monotonic_ns()
            await asyncio.sleep(0.3)
            last = time.monotonic_ns()
        await load.wait_requests(load.completed + 200, 60)
    table = load.df()
    slack = load.clock_error_ns + 1_000_000
    meanwhile = table[table["due_ns"].between(first + slack, last - slack)]
    assert len(meanwhile) > 10
    has_waited = meanwhile["latency_ns"] >= last - slack - meanwhile["due_ns"]
    # Of what each client had under way, the log may say too late when it was due.
    assert (~has_waited).sum() <= 2
    assert meanwhile["due_ns"].max() - meanwhile["due_ns"].min() > (last - first) // 2


def processes_of(server: Server) -> list[int]:
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text()
    return [server.pid, *map(int, children.split())]


async def test_nothing_that_listens_is_one_clear_line(has_pgbench: None) -> None:
    port = free_port()
    with pytest.raises(GuestError, match=f"at port {port}.*[Cc]onnection refused"):
        async with pgbench_load(port=port):
            pass
    with pytest.raises(GuestError, match=f"at port {port}.*[Cc]onnection refused"):
        await initialise(1, port=port)


async def test_missing_tables_are_one_clear_line(postgres: Server, has_pgbench: None) -> None:
    with pytest.raises(GuestError, match="pgbench_branches"):
        async with pgbench_load(port=postgres.port, user="postgres", database="template1"):
            pass


async def test_a_pgbench_that_goes_away_is_a_problem(tables: Server) -> None:
    async def load_that_dies() -> None:
        async with pgbench_load(port=tables.port, **ROLE, clients=2) as load:
            os.kill(load.pid, signal.SIGKILL)
            await load.wait_requests(10**9, 60)

    with pytest.raises(GuestError, match="pgbench ended early"):
        await load_that_dies()


async def test_no_rate_is_none() -> None:
    with pytest.raises(UsageError):
        async with pgbench_load(port=1, rate_per_s=0):
            pass
