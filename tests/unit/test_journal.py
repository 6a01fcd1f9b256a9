"""What is awaited is found, whether it was there or comes later, and a problem ends the wait."""

import asyncio

import pytest

from lab.journal import Journal

BOUND_S = 60.0


def is_even(number: int) -> bool:
    return number % 2 == 0


async def test_an_entry_is_found_that_is_there_and_one_that_is_to_come() -> None:
    journal = Journal[int]()
    for number in (1, 2, 4):
        journal.add(number)
    assert await journal.first(is_even, timeout_s=BOUND_S) == 2
    assert await journal.first(is_even, since=2, timeout_s=BOUND_S) == 4
    waiting = [
        asyncio.create_task(journal.first(is_even, since=since, timeout_s=BOUND_S))
        for since in (3, 4)
    ]
    await asyncio.sleep(0)
    journal.add(5)
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    journal.add(6)
    assert await asyncio.gather(*waiting) == [6, 6]
    assert journal.entries == [1, 2, 4, 5, 6]


async def test_a_problem_ends_a_wait_but_not_for_what_is_there() -> None:
    journal = Journal[int]()
    waiting = asyncio.create_task(journal.first(is_even, timeout_s=BOUND_S))
    await asyncio.sleep(0)
    journal.fail(ValueError("over"))
    journal.fail(ValueError("later"))
    with pytest.raises(ValueError, match="over"):
        await waiting
    journal.add(2)
    assert await journal.first(is_even, timeout_s=BOUND_S) == 2
    with pytest.raises(ValueError, match="over"):
        await journal.first(is_even, since=1, timeout_s=BOUND_S)
    journal.problem = None
    with pytest.raises(TimeoutError):
        await journal.first(is_even, since=1, timeout_s=0.01)
