import asyncio
from pathlib import Path

import psutil
import pytest

from lab.errors import BuildError, HostError
from lab.host.tools import log_tail, require_tools, run_tool


async def test_output_is_returned_logged_and_seen_line_by_line(tmp_path: Path) -> None:
    seen: list[str] = []
    log = tmp_path / "log"

    lines = await run_tool(
        ["sh", "-c", "echo one; echo two >&2; printf three"], log=log, on_line=seen.append
    )

    assert lines == seen == ["one", "two", "three"]
    assert log.read_text().endswith("one\ntwo\nthree\n")


async def test_a_line_of_any_length_is_read(tmp_path: Path) -> None:
    (line,) = await run_tool(["sh", "-c", "printf '%0200000d' 0"], log=tmp_path / "log")

    assert len(line) == 200000


async def test_a_failure_names_the_log_and_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"

    with pytest.raises(BuildError) as caught:
        await run_tool(["sh", "-c", "echo broken; exit 3"], log=log)

    assert "sh failed with status 3" in caught.value.cause
    assert "broken" in caught.value.cause
    assert str(log) in caught.value.remedy


async def test_an_accepted_status_is_no_failure(tmp_path: Path) -> None:
    assert await run_tool(["sh", "-c", "exit 1"], log=tmp_path / "log", accept=(0, 1)) == []


async def test_a_missing_program_is_the_hosts_fault(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"no-such-tool; run `sh lab/bootstrap\.sh`"):
        await run_tool(["no-such-tool"], log=tmp_path / "log")
    require_tools(["sh"])


def alive(pids: list[int]) -> list[psutil.Process]:
    return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("trap", ["", "trap '' TERM;"])
async def test_cancelling_ends_the_tool_and_what_it_started(tmp_path: Path, trap: str) -> None:
    started = asyncio.Event()
    pids: list[int] = []

    def on_line(line: str) -> None:
        pids.append(int(line))
        started.set()

    script = f"{trap} sleep 600 & echo $!; wait"
    task = asyncio.create_task(
        run_tool(["sh", "-c", script], log=tmp_path / "log", on_line=on_line)
    )
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    # It got SIGKILL before run_tool returned; the kernel may still be taking it down.
    await asyncio.to_thread(psutil.wait_procs, alive(pids), 10)
    assert all(gone(pid) for pid in pids)


def test_the_tail_of_a_log_is_one_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("a\n\n b \nc\nd\n\n")

    assert log_tail(log) == "b | c | d"
    assert log_tail(tmp_path / "missing") == ""
