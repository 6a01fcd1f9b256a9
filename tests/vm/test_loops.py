"""A guest belongs to the event loop that it was booted in, and not to that loop's thread."""

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import lab
from lab.errors import UsageError
from lab.session import VM
from tests.support.bench import works_on
from tests.support.paths import ROOT

pytestmark = [pytest.mark.vm, pytest.mark.platforms("micro-tcg")]

MACHINE = lab.Machine(guest="micro", ram_mib=64)
WORKLOAD = lab.Workload("random", wss_mib=16)
NAME = "the-notebooks-other-thread"


def in_a_thread(work: Callable[[], None]) -> None:
    """Do work in a thread, which has ended afterwards."""
    thread = threading.Thread(target=work, name=NAME)
    thread.start()
    thread.join()


def uses(vm: VM, folder: Path) -> Iterator[Callable[[], object]]:
    yield vm.status
    yield lambda: vm.hmp("info ramblock")
    yield lambda: vm.snapshot(folder / "a.snap", progress=False)
    yield vm.progress_page
    yield vm.verify_working_set
    yield vm.reset


async def refused(vm: VM, folder: Path, why: str) -> None:
    """Every use is refused in one line that names the thread, and leaves no file."""
    for use in uses(vm, folder):
        with pytest.raises(UsageError, match=f"event loop of thread {NAME}, {why}") as caught:
            await use()  # type: ignore[misc]  # functions of several types
        assert caught.value.remedy
        assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []


def test_a_guest_whose_loop_has_ended_is_gone_and_its_use_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Field report F15."""
    guests: list[VM] = []
    contexts = []

    async def boot() -> None:
        context = lab.boot(MACHINE, WORKLOAD)
        contexts.append(context)
        guests.append(await context.__aenter__())

    in_a_thread(lambda: asyncio.run(boot()))
    (vm,) = guests
    assert vm.process.exit_code is not None
    assert not vm.process.workdir.exists()
    asyncio.run(refused(vm, tmp_path, "which has ended"))
    assert [record.getMessage() for record in caplog.records] == []


def test_a_guest_outlives_the_threads_that_its_loop_runs_in(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Field report F23."""
    loop = asyncio.new_event_loop()
    stack = contextlib.AsyncExitStack()
    guests: list[VM] = []

    async def boot() -> None:
        guests.append(await stack.enter_async_context(lab.boot(MACHINE, WORKLOAD)))

    with contextlib.closing(loop):
        in_a_thread(lambda: loop.run_until_complete(boot()))
        (vm,) = guests
        in_a_thread(lambda: loop.run_until_complete(works_on(vm)))
        loop.run_until_complete(works_on(vm))
        loop.run_until_complete(stack.aclose())
    assert vm.process.exit_code == 0
    assert not caplog.records


# A notebook's subshell that is deleted leaves its loop like this.
SUBSHELL = """
import asyncio, sys, threading, lab
machine, workload = lab.Machine(guest="micro", ram_mib=64), lab.Workload("random", wss_mib=16)
guests, contexts = [], []

def subshell():
    loop = asyncio.new_event_loop()
    async def boot():
        contexts.append(lab.boot(machine, workload))
        guests.append(await contexts[-1].__aenter__())
    loop.run_until_complete(boot())
    loop.close()

def in_a_thread():
    thread = threading.Thread(target=subshell, name="the-subshell")
    thread.start()
    thread.join()

async def is_ended(vm):
    return await vm.process.wait(60)

async def use(vm):
    assert vm.process.exit_code is None
    try:
        await vm.status()
    except lab.UsageError as error:
        print(error)
    print(await is_ended(vm))

async def boot_another(vm):
    assert vm.process.exit_code is None
    async with lab.boot(machine, workload):
        print(await is_ended(vm))

for end in (use, boot_another):
    in_a_thread()
    asyncio.run(end(guests[-1]))
in_a_thread()
assert guests[-1].process.exit_code is None
print(guests[-1].pid)
"""


def test_a_guest_whose_loop_was_closed_around_it_is_ended_when_that_is_noticed(
    tmp_path: Path,
) -> None:
    """Field report F23."""
    done = subprocess.run(
        [sys.executable, "-c", SUBSHELL],
        cwd=ROOT,
        # What is left of a guest that ends with the interpreter is left here.
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    line, *ended, last = done.stdout.splitlines()
    assert line.startswith(
        "this guest was booted in the event loop of thread the-subshell, which has ended, and so "
        "has the guest; boot it"
    )
    assert ended == ["True", "True"]
    assert done.stderr == ""
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(last)).wait(60)


async def test_another_loop_is_told_whose_the_guest_is(tmp_path: Path) -> None:
    """Field report F15."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name=NAME)
    thread.start()
    stack = contextlib.AsyncExitStack()
    try:
        booted = stack.enter_async_context(lab.boot(MACHINE, WORKLOAD))
        vm = await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(booted, loop))
        await refused(vm, tmp_path, "and this is another")
        # That loop did not notice.
        there = asyncio.run_coroutine_threadsafe(works_on(vm), loop)
        await asyncio.wrap_future(there)
    finally:
        closed = asyncio.run_coroutine_threadsafe(stack.aclose(), loop)
        await asyncio.wrap_future(closed)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
    assert vm.process.exit_code == 0
