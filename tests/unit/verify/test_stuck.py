"""A thread that waits too long for one page is found, and one that gets on, or waits for what is
slow, is not.
"""

import asyncio
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from lab.verify import stuck
from lab.verify.stuck import Sight, Watch, look, watching

VCPU = Sight(tid=7, name="CPU 0/TCG", waits_in="handle_userfault", faults=100, is_blocked=False)
WRITER = Sight(tid=8, name="mig/snapshot", waits_in="", faults=5, is_blocked=False)


def noted(*looks: tuple[float, list[Sight]]) -> Watch:
    watch = Watch(limit_s=1.0)
    for now_s, sights in looks:
        watch.note(now_s, sights)
    return watch


def every(step_s: float, end_s: float) -> list[float]:
    return [step_s * i for i in range(round(end_s / step_s) + 1)]


def test_a_thread_that_waits_over_a_second_for_one_page_is_stuck() -> None:
    found = noted(*((t, [VCPU, WRITER]) for t in every(0.05, 1.1)))
    assert found.stuck == {7: "CPU 0/TCG"}
    assert found.finding == "waited over 1 s for one page: CPU 0/TCG"
    assert noted(*((t, [VCPU, WRITER]) for t in every(0.05, 0.9))).finding == ""


def test_a_thread_that_has_a_page_now_and_then_is_not() -> None:
    looks = [(t, [replace(VCPU, faults=int(t / 0.5))]) for t in every(0.05, 10)]
    assert noted(*looks).stuck == {}


def test_a_thread_that_does_something_else_in_between_is_not() -> None:
    looks = [
        (t, [VCPU if i % 10 else replace(VCPU, waits_in="")]) for i, t in enumerate(every(0.05, 10))
    ]
    assert noted(*looks).stuck == {}


def test_the_time_in_which_the_disk_does_not_answer_is_not_counted() -> None:
    blocked = replace(WRITER, waits_in="balance_dirty_pages", is_blocked=True)
    looks = [(t, [VCPU, blocked]) for t in every(0.05, 10)]
    assert noted(*looks).stuck == {}
    # Once it answers again the wait counts.
    looks += [(10 + t, [VCPU, WRITER]) for t in every(0.05, 1.1)]
    assert noted(*looks).stuck == {7: "CPU 0/TCG"}
    # A disk of the guest's is another matter, and so is a page that the snapshot itself waits for.
    for other in (replace(blocked, name="disk-thread"), replace(VCPU, tid=8, name="mig/snapshot")):
        looks = [(t, [VCPU, replace(other, is_blocked=True)]) for t in every(0.05, 1.1)]
        assert 7 in noted(*looks).stuck


def test_what_happens_between_two_looks_that_are_far_apart_is_not_counted() -> None:
    assert noted(*((t, [VCPU, WRITER]) for t in every(2.0, 6.0))).stuck == {}
    # Who is stuck is found all the same.
    assert noted(*((t, [VCPU, WRITER]) for t in every(2.0, 14.0))).stuck == {7: "CPU 0/TCG"}


def test_the_time_in_which_the_guest_is_held_is_not_counted() -> None:
    watch = Watch(limit_s=1.0)
    for t in every(0.05, 0.9):
        watch.note(t, [VCPU])
    with watch.suspended():
        for t in every(0.05, 5):
            watch.note(1 + t, [VCPU])
    for t in every(0.05, 0.9):
        watch.note(6 + t, [VCPU])
    assert watch.stuck == {}


def test_where_the_kernel_shows_nothing_nothing_is_seen() -> None:
    assert not noted((0.0, [WRITER]), (1.0, [WRITER])).sees
    assert noted((0.0, [WRITER, VCPU])).sees


def test_the_threads_of_a_process_are_seen_as_they_are() -> None:
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait, name="a) (b")
    thread.start()
    try:
        Path(f"/proc/self/task/{thread.native_id}/comm").write_text("a) (b")
        found = {sight.tid: sight for sight in look(os.getpid())}
    finally:
        ended.set()
        thread.join()
    assert found[thread.native_id or 0].name == "a) (b"
    assert not found[thread.native_id or 0].waits_for_a_page
    assert found[threading.get_native_id()].faults > 0


def test_a_process_that_has_ended_has_no_threads() -> None:
    child = os.posix_spawn("/bin/true", ["true"], os.environ)
    os.waitpid(child, 0)
    assert look(child) == []


async def test_a_process_is_looked_at_until_the_context_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = 0
    enough = asyncio.Event()
    monkeypatch.setattr(stuck, "POLL_S", 0)

    def counted(pid: int) -> list[Sight]:
        nonlocal looks
        looks += 1
        if looks == 3:
            enough.set()
        return [VCPU]

    async with watching(1, look=counted) as watch:
        await enough.wait()
    assert watch.sees
    after = looks
    await asyncio.sleep(0)
    assert looks == after
