"""Named campaigns are the plans of the recorded sets, and a plan is a command line."""

import argparse
import re
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.__main__ import build_parser, main
from lab.errors import UsageError
from lab.runs.sets import load_set
from lab.scenario.campaigns import campaign, campaigns
from lab.scenario.command import command, plan_from_arguments
from lab.scenario.flags import from_arguments
from lab.scenario.floor import BENCHMARKS, FloorPlan
from lab.scenario.methods import METHODS
from lab.scenario.plan import Plan, slots
from tests.support.paths import DATA
from tests.support.strategies import instruments, machines, storages, workloads

README = (DATA / "README.md").read_text(encoding="utf-8").split("\n## ")[1]
DEFAULTS = Plan(methods=tuple(METHODS))


def parsed(line: str) -> argparse.Namespace:
    _, *arguments = shlex.split(line)
    return build_parser().parse_args(arguments)


def test_campaigns_are_those_of_the_recorded_sets_with_their_questions() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (.*?\?)", README, re.MULTILINE)
    assert rows == [(name, one.question) for name, one in campaigns().items()]


@pytest.mark.parametrize("name", campaigns())
def test_a_campaign_is_the_plan_of_its_recorded_set(name: str) -> None:
    recorded, plan = load_set(DATA / name, verify=False), campaign(name).plan
    # A parameter that did not exist then is as `from_json` says it was.
    assert recorded.plan == plan
    if isinstance(plan, Plan):
        assert [slot.case.name for slot in slots(plan)] == recorded.record.plan["order"]
        assert len(recorded) == len(slots(plan))


def test_an_unknown_campaign_is_refused_with_the_names_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(UsageError, match="choose from: first-light, "):
        campaign("nonsense")
    assert main(["measure", "--campaign", "nonsense", "--dry-run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_campaign_that_another_command_measures_names_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["measure", "--campaign", "floor", "--dry-run"]) == 2
    assert "use `lab floor --samples=101`" in capsys.readouterr().err


def test_campaigns_are_listed_with_their_questions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "--campaigns"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1) for line in listed] == [
        [name, one.question] for name, one in campaigns().items()
    ]


def test_a_campaign_is_measured_as_it_is_or_with_what_other_flags_change(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["measure", "--campaign", "kvm-faults", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("18 runs: 3 x 6 cases; 512 MiB RAM, 1 vCPU, microguest;")
    assert (out.count("accel=tcg"), out.count("accel=kvm")) == (9, 9)
    changed = ["--ram-mib=1024", "--repeats=1", "--method=live", "--vary=accel=tcg"]
    assert main(["measure", *changed, "--campaign", "kvm-faults", "--dry-run"]) == 0
    head, only = capsys.readouterr().out.splitlines()
    assert head.startswith("1 runs: 1 x 1 cases; 1024 MiB RAM, 1 vCPU, microguest;")
    assert "2000 operations/s" in head
    assert only.endswith("live, accel=tcg")


@pytest.mark.parametrize("name", campaigns())
def test_the_command_of_a_campaign_measures_it(name: str) -> None:
    recorded, plan = load_set(DATA / name, verify=False), campaign(name).plan
    args = parsed(recorded.command)
    made = (
        plan_from_arguments(args, DEFAULTS)
        if isinstance(plan, Plan)
        else from_arguments(type(plan), args)
    )
    assert made == plan


varied = st.fixed_dictionaries(
    {},
    optional={
        "ram_kind": st.permutations(["anon", "memfd", "file"]).map(tuple),
        "thp": st.sampled_from([(True, False), (None, True), (False,)]),
        "vcpus": st.lists(st.integers(1, 64), min_size=1, max_size=3, unique=True).map(tuple),
        "time_threads": st.just((False, True)),
        "seed": st.just((2**63 - 1, 0)),
    },
)


streams = [name for name, how in METHODS.items() if how.runs_on("patched") and how.is_stream]
plans = st.builds(
    Plan,
    methods=st.lists(st.sampled_from(streams), min_size=1, unique=True).map(tuple),
    machine=machines,
    workload=workloads,
    storage=storages,
    instruments=instruments,
    repeats=st.integers(1, 9),
    warmups=st.integers(0, 9),
    seed=st.integers(-5, 2**70),
    verify=st.booleans(),
    vary=varied,
)


@given(plans)
def test_the_command_of_a_plan_gives_the_plan_again(plan: Plan) -> None:
    assert plan_from_arguments(parsed(command(plan)), DEFAULTS) == plan


@given(
    st.lists(st.sampled_from(BENCHMARKS), min_size=1, unique=True).map(tuple),
    st.integers(1, 99),
    st.integers(8, 1 << 20),
    st.integers(1, 100_000),
    st.integers(0, 1_000_000),
)
def test_the_command_of_a_floor_gives_its_plan_again(
    benchmarks: tuple[str, ...], repeats: int, mib: int, samples: int, delay_us: int
) -> None:
    plan = FloorPlan(
        benchmarks=benchmarks, repeats=repeats, mib=mib, samples=samples, delay_us=delay_us
    )
    assert from_arguments(FloorPlan, parsed(command(plan))) == plan
