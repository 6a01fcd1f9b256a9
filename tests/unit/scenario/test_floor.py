"""What the floor measures: the plan, its order and its limits."""

from typing import Any

import pytest

from lab.errors import UsageError
from lab.scenario.floor import (
    ARM_SAMPLES,
    BENCHMARKS,
    FloorPlan,
    all_blocks,
    describe,
    round_blocks,
)


def test_every_block_is_there_once_and_has_a_label_of_its_own() -> None:
    blocks = all_blocks()
    assert len({block.label for block in blocks}) == len(blocks)
    assert {block.benchmark for block in blocks} == set(BENCHMARKS)


def test_every_round_holds_every_block_in_an_order_fixed_by_the_seed() -> None:
    plan = FloorPlan(seed=5)
    rounds = [round_blocks(plan, k) for k in range(3)]
    assert all(sorted(map(repr, r)) == sorted(map(repr, all_blocks())) for r in rounds)
    assert rounds[0] != rounds[1] != rounds[2]
    assert rounds == [round_blocks(FloorPlan(seed=5), k) for k in range(3)]
    assert rounds[0] != round_blocks(FloorPlan(seed=6), 0)


def test_a_plan_of_some_benchmarks_holds_only_their_blocks() -> None:
    plan = FloorPlan(benchmarks=("scan", "copy"))
    assert {block.benchmark for block in round_blocks(plan, 0)} == {"scan", "copy"}
    assert len(list(describe(plan))) == 1 + len(round_blocks(plan, 0))


def test_arguments_say_all_that_the_program_needs() -> None:
    plan = FloorPlan(mib=2048, write_mib=64, samples=31, delay_us=7, seed=3)
    given = {block.label: plan.arguments(block, 2, "folder") for block in all_blocks()}
    assert given["fault spin anon-4k busy"] == [
        *("fault", "spin", "ram=anon-4k", "mib=256", "busy=1", "samples=31", "delay_us=7"),
        *("seed=3002", "dir=folder"),
    ]
    arm = given["arm populated hugetlb"]
    assert {"mib=2048", f"samples={ARM_SAMPLES}", "delay_us=0"} < set(arm)
    assert "chunk=64" in given["unprotect sweep 64 pages anon-thp"]
    assert "mib=64" in given["write fresh tmpfs"]


@pytest.mark.parametrize(
    "settings",
    [
        {"benchmarks": ()},
        {"benchmarks": ("nonsense",)},
        {"repeats": 0},
        {"mib": 4},
        {"write_mib": 4},
        {"samples": 0},
        {"delay_us": -1},
        {"seed": -1},
    ],
)
def test_a_plan_that_can_not_work_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        FloorPlan(**settings)
