"""Sets of several hosts stand side by side in tables; a set of one host looks as ever."""

import dataclasses
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from lab.analysis.compare import comparison_text, sides
from lab.analysis.faults import df_faults_by_method
from lab.analysis.phases import df_phases_by_method
from lab.analysis.stages import df_fault_stages
from lab.runs.cases import case_columns, case_label, df_runs, together
from lab.runs.methods import df_methods, df_readable
from lab.runs.run import Run, host_name
from lab.runs.sets import RunSet, load_set
from lab.scenario.campaigns import campaigns
from tests.support.paths import DATA

MakeSet = Callable[..., RunSet]

HERE = "made up, Linux 0"
THERE = "4 x another, Linux 1"


def moved(run_set: RunSet) -> RunSet:
    """A set as if it had been measured on another host."""
    host = {"cpu_count": 4, "cpu_model": "another", "kernel": "1"}
    runs = [
        dataclasses.replace(run, record=msgspec.structs.replace(run.record, host=host))
        for run in run_set
    ]
    return RunSet(run_set.path, msgspec.structs.replace(run_set.record, host=host), runs)


@pytest.fixture
def both(make_synthetic_set: MakeSet) -> tuple[RunSet, RunSet]:
    return make_synthetic_set(name="here"), moved(make_synthetic_set(name="there", repeats=3))


def test_runs_of_one_host_have_no_column_for_it(both: tuple[RunSet, RunSet]) -> None:
    for one in both:
        assert case_columns(df_runs(one)) == ["method"]
        assert "host" not in df_runs([*one, *one])


def test_runs_of_several_hosts_are_told_apart_by_it(both: tuple[RunSet, RunSet]) -> None:
    here, there = both
    assert (here.host, there.host) == (HERE, THERE)
    frame = df_runs([*here, *there])
    assert case_columns(frame) == ["method", "host"]
    assert frame.groupby("host").size().to_dict() == {HERE: len(here), THERE: len(there)}
    methods = df_methods([*here, *there])
    assert dict(zip(methods["host"], methods["n"], strict=True)) == {HERE: 2, THERE: 3}
    assert len(methods) == 2 * len(here.methods)
    assert "host" in df_readable(methods)


@pytest.mark.parametrize("table", [df_faults_by_method, df_phases_by_method, df_fault_stages])
def test_tables_of_events_of_several_hosts_say_which(
    table: Callable[[Any], Any], both: tuple[RunSet, RunSet]
) -> None:
    here, there = both
    rows = table([*here, *there])
    assert case_columns(rows) == ["method", "host"]
    assert set(rows["host"]) == {HERE, THERE}


def test_a_case_names_its_host_only_beside_others(both: tuple[RunSet, RunSet]) -> None:
    here, there = both
    assert case_label(together(here)[0].case_values) == here.runs[0].record.method
    assert case_label(together([*here, *there])[0].case_values).endswith(f", host={HERE}")


def test_runs_that_varied_other_parameters_say_what_theirs_were(
    both: tuple[RunSet, RunSet],
) -> None:
    here, _ = both
    varied = [dataclasses.replace(run, varied=("vcpus",)) for run in here]
    assert set(df_runs([*varied, *here])["vcpus"]) == {1}


def test_a_comparison_of_two_hosts_says_so(both: tuple[RunSet, RunSet]) -> None:
    here, there = both
    text = comparison_text(*sides(here, there, "live-rfc", None)[0])
    assert f"host: {HERE} -> {THERE}" in text
    assert "caveat: measured on different hosts" in text
    same = comparison_text(*sides(here, here, "live-rfc", "background")[0])
    assert "host" not in same


def test_a_host_is_named_by_what_is_recorded_of_it() -> None:
    assert host_name({"cpu_count": 2, "cpu_model": "A", "kernel": "6.1"}) == "2 x A, Linux 6.1"
    assert host_name({}) == "an unknown CPU, Linux unknown"


@pytest.mark.parametrize("name", campaigns())
def test_a_recorded_set_is_of_one_host(name: str) -> None:
    runs: list[Run] = list(load_set(DATA / name, verify=False))
    assert {run.host for run in runs} == {load_set(DATA / name, verify=False).host}
