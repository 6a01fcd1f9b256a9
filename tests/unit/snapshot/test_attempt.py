"""Taking back a snapshot runs to its end, and a cancellation meanwhile is not lost."""

import asyncio

import pytest

from lab.snapshot.attempt import to_the_end


async def test_work_goes_on_through_cancellations_which_then_take_effect() -> None:
    gate, finished = asyncio.Event(), False

    async def work() -> None:
        nonlocal finished
        await gate.wait()
        finished = True

    task = asyncio.create_task(to_the_end(work()))
    for _ in range(3):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert finished


async def test_without_a_cancellation_it_just_returns() -> None:
    async def work() -> None:
        await asyncio.sleep(0)

    await to_the_end(work())
