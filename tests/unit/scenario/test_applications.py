"""Plans of `lab applications`: what is measured in which order, and what cannot be."""

import shlex
from itertools import pairwise

import pytest

from lab.__main__ import build_parser
from lab.errors import UsageError
from lab.measure.applications.steps import STEPS
from lab.scenario.applications import (
    APPLICATIONS,
    BGSAVE,
    ApplicationsPlan,
    describe,
    turns,
    variant_of,
)
from lab.scenario.command import command
from lab.scenario.document import from_json, to_json
from lab.scenario.flags import from_arguments


def test_every_round_holds_every_method_once_and_boots_each_qemu_once() -> None:
    plan = ApplicationsPlan(rounds=4)
    found = turns(plan)
    assert [turn.order for turn in found] == list(range(4 * len(plan.methods)))
    for round_ in range(4):
        of_round = [turn for turn in found if turn.round == round_]
        assert sorted(turn.method for turn in of_round) == sorted(plan.methods)
        variants = [variant_of(turn.method) for turn in of_round]
        assert sum(a != b for a, b in pairwise(variants)) == len(plan.variants) - 1


def test_the_order_is_drawn_from_the_seed() -> None:
    assert turns(ApplicationsPlan()) == turns(ApplicationsPlan())
    assert turns(ApplicationsPlan()) != turns(ApplicationsPlan(seed=2))
    orders = {
        tuple(turn.method for turn in turns(ApplicationsPlan(rounds=8)) if turn.round == round_)
        for round_ in range(8)
    }
    assert len(orders) > 4


def test_bgsave_is_of_redis_alone() -> None:
    assert "redis-bgsave" in ApplicationsPlan().methods
    assert "redis-bgsave" not in ApplicationsPlan(application="pgbench").methods
    with pytest.raises(UsageError, match="is of Redis"):
        ApplicationsPlan(application="pgbench", methods=("redis-bgsave",))


@pytest.mark.parametrize(
    ("methods", "why"),
    [
        (("libvirt-external",), "name migrate-to-file"),
        (("nonsense",), "unknown method"),
        (("live", "live"), "named twice"),
    ],
)
def test_what_cannot_be_measured_is_refused(methods: tuple[str, ...], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        ApplicationsPlan(methods=methods)


@pytest.mark.parametrize(
    "plan",
    [
        ApplicationsPlan(),
        ApplicationsPlan(application="pgbench", methods=("live", "none"), rounds=2, scale=3),
        ApplicationsPlan(application="redis-set-half", clients=7, keys=10, value_bytes=3, seed=9),
    ],
)
def test_a_plan_is_the_same_by_way_of_json_and_of_its_command(plan: ApplicationsPlan) -> None:
    assert from_json(ApplicationsPlan, to_json(plan)) == plan
    arguments = build_parser().parse_args(shlex.split(command(plan))[1:])
    assert from_arguments(ApplicationsPlan, arguments) == plan


def test_what_would_be_measured_can_be_said() -> None:
    lines = list(describe(ApplicationsPlan(methods=("live", "background"), rounds=2)))
    assert "50 connections" in lines[0]
    assert "4 boots" in lines[0]
    assert len(lines) == 5


def test_what_works_by_itself_has_a_loop_for_each_client() -> None:
    of_the_shell = {name for name, served in APPLICATIONS.items() if served.server == "shell"}
    assert set(STEPS) == of_the_shell
    for name in of_the_shell:
        assert ApplicationsPlan(application=name).connections == 1
        loops = [STEPS[name].loop(client) for client in range(3)]
        assert len(set(loops)) == 3
        assert BGSAVE not in ApplicationsPlan(application=name).methods
