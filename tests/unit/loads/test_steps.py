"""A step ends with a line, whose instant is noted on this host.  `ssh` runs the command here."""

import os
import time
from pathlib import Path

import pytest

from lab.errors import GuestError, HostError, UsageError
from lab.loads import steps
from lab.loads.steps import steps_load

KEY = Path("key")
HERE = """#!/bin/sh
for last; do :; done
exec sh -c "$last"
"""


@pytest.fixture(autouse=True)
def _ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(HERE)
    (folder / "ssh").chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


async def test_steps_are_from_line_to_line_and_the_last_is_not_done() -> None:
    begun_ns = time.monotonic_ns()
    loops = ["while :; do echo; sleep 0.02; done"] * 2

    async with steps_load("two loops", port=1, key=KEY, commands=loops) as load:
        await load.wait_requests(10, 30)
        meanwhile = load.df()
        assert not load.has_ended
    table = load.df()

    assert len(meanwhile) <= len(table) == load.completed + 2
    assert set(table["client"]) == {0, 1}
    assert set(table["operation"]) == {"step"}
    for _, one in table.groupby("client"):
        assert one["due_ns"].iloc[0] > begun_ns
        assert (one["due_ns"].to_numpy()[1:] == one["done_ns"].to_numpy()[:-1]).all()
        assert list(one["censored"]) == [False] * (len(one) - 1) + [True]
        assert list(one["ok"]) == [True] * (len(one) - 1) + [False]
        done = one[one["ok"]]
        # The loop sleeps between two lines.
        assert (done["latency_ns"] > 10_000_000).sum() > len(done) / 2


async def test_lines_that_come_together_are_steps_of_no_time() -> None:
    async with steps_load(
        "bursts", port=1, key=KEY, commands=["printf '1\\n2\\n3\\n'; exec sleep 60"]
    ) as load:
        await load.wait_requests(2, 30)
    assert list(load.df()["latency_ns"][:2]) == [0, 0]


async def test_a_command_that_ends_is_a_problem_with_its_last_words() -> None:
    with pytest.raises(GuestError, match=r"loop ended early: no room"):
        async with steps_load(
            "loop", port=1, key=KEY, commands=["echo; sleep 0.2; echo no room >&2; exit 1"]
        ) as load:
            await load.wait_requests(5, 30)
    with pytest.raises(GuestError, match="loop ended early: it said nothing"):
        async with steps_load("loop", port=1, key=KEY, commands=["exit 0"]):
            pass


async def test_a_command_that_never_begins_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "READY_S", 0.2)
    with pytest.raises(GuestError, match=r"has not begun within 0\.2 s"):
        async with steps_load("loop", port=1, key=KEY, commands=["exec sleep 60"]):
            pass


async def test_what_cannot_work_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no command"):
        async with steps_load("loop", port=1, key=KEY, commands=[]):
            pass
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(HostError, match="ssh"):
        async with steps_load("loop", port=1, key=KEY, commands=["true"]):
            pass
