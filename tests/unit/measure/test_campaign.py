"""Campaigns: order, marking, resuming and failing, with a sampler that boots nothing."""

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lab.analysis.compare import comparison_text, sides
from lab.cli.measure import run_campaign
from lab.errors import HostError, RunError, SnapshotError, UsageError
from lab.figures.stamp import stamp_text
from lab.instruments.progress import sampler_warnings
from lab.measure.campaign import measure, open_set, plan_of, summarise
from lab.measure.ground import Ground
from lab.measure.sample import (
    Sample,
    check_room,
    filesystem_of,
    no_garbage_collection,
)
from lab.measure.settle import is_settled
from lab.runs.cases import case_columns, df_runs
from lab.runs.columns import METRICS, SUMMARY_FIELDS
from lab.runs.methods import df_methods
from lab.runs.sets import RunSet, create_set, load_set
from lab.scenario.instruments import Instruments
from lab.scenario.machine import Machine
from lab.scenario.plan import Plan, describe, slots
from lab.scenario.scenario import Scenario
from lab.scenario.storage import Storage
from lab.scenario.workload import Workload
from tests.support.paths import TEST_DATA

GROUND = Ground(
    host={"cpu_model": "made up"},
    binaries={
        "patched": {"version": "0", "build_id": "p"},
        "unpatched": {"version": "0", "build_id": "u"},
        "guest": {"kernel_version": "0"},
    },
)
PLAN = Plan(methods=("live-rfc", "background", "stop-and-copy"), repeats=4, seed=7)


class FakeSampler:
    """Gives a sample a call, or raises what was put in `script` for that call."""

    def __init__(self, script: dict[int, BaseException | Sample] | None = None) -> None:
        self.script = script or {}
        self.seen: list[str] = []

    async def __call__(self, scenario: Scenario, image: Path, **_options: Any) -> Sample:
        outcome = self.script.get(len(self.seen))
        self.seen.append(scenario.method)
        if isinstance(outcome, BaseException):
            raise outcome
        if outcome is not None:
            return outcome
        return Sample(outcome="ok", figures={"pause_ms": 1.0 + len(self.seen)})


async def campaign(out: Path, sampler: FakeSampler, plan: Plan = PLAN) -> RunSet:
    return await measure(plan, out, image_dir=out.parent, ground=GROUND, sampler=sampler)


def test_every_round_holds_every_method_once() -> None:
    planned = slots(PLAN)
    assert [slot.order for slot in planned] == list(range(12))
    for round_ in range(4):
        assert {s.case.name for s in planned if s.round == round_} == set(PLAN.methods)


def test_the_order_changes_between_rounds_and_is_fixed_by_the_seed() -> None:
    plan = Plan(methods=PLAN.methods, repeats=10, seed=3)
    assert slots(plan) == slots(plan)
    orders = {tuple(s.case.name for s in slots(plan) if s.round == r) for r in range(10)}
    assert len(orders) > 1
    other = Plan(methods=PLAN.methods, repeats=10, seed=4)
    assert [s.case.name for s in slots(plan)] != [s.case.name for s in slots(other)]


VARIED = Plan(
    methods=("live", "live-inline"),
    repeats=3,
    vary={"workload": ("random", "scattered"), "ram_kind": ("memfd", "anon")},
)


def test_what_is_varied_is_measured_in_every_combination_in_every_round() -> None:
    planned = slots(VARIED)
    assert len(planned) == 3 * 2 * 2 * 2
    for round_ in range(3):
        seen = {
            (
                s.case.scenario.method,
                s.case.scenario.workload.kind,
                s.case.scenario.machine.ram_kind,
            )
            for s in planned
            if s.round == round_
        }
        assert len(seen) == 8
    assert describe(VARIED)[0].startswith("24 runs: 3 x 8 cases")


async def test_a_varied_set_is_read_again_case_by_case(tmp_path: Path) -> None:
    await campaign(tmp_path / "set", FakeSampler(), VARIED)
    loaded = load_set(tmp_path / "set")
    assert loaded.varied == ("ram_kind", "workload")
    assert loaded.methods == ["live", "live-inline"]
    assert loaded.cases[:3] == [
        "live, ram_kind=memfd, workload=random",
        "live, ram_kind=memfd, workload=scattered",
        "live, ram_kind=anon, workload=random",
    ]
    assert len(loaded.measured(loaded.cases[0])) == 3
    table = df_methods(loaded)
    assert case_columns(table) == ["method", "ram_kind", "workload"]
    assert list(table["method"]) == ["live"] * 4 + ["live-inline"] * 4
    assert list(table["ram_kind"]) == ["anon", "anon", "memfd", "memfd"] * 2
    assert list(table["workload"]) == ["random", "scattered"] * 4
    assert set(table["n"]) == {3}
    runs = df_runs(loaded)
    assert set(runs["ram_kind"]) == {"memfd", "anon"}
    assert list(runs.columns[:4]) == ["run", "method", "ram_kind", "workload"]
    assert "boots per case" in stamp_text(loaded)
    assert plan_of(loaded) == VARIED
    left, right = sides(loaded, loaded, loaded.cases[0], loaded.cases[1])[0]
    assert "workload: random -> scattered" in comparison_text(left, right)


async def test_an_interrupted_varied_campaign_is_continued(tmp_path: Path) -> None:
    with pytest.raises(asyncio.CancelledError):
        await campaign(tmp_path / "set", FakeSampler({7: asyncio.CancelledError()}), VARIED)
    rest = FakeSampler()
    done = await campaign(tmp_path / "set", rest, VARIED)
    assert len(rest.seen) == 24 - 7
    assert all(len(done.measured(case)) == 3 for case in done.cases)


def test_an_instrument_can_be_left_out_of_every_second_run_of_a_round() -> None:
    plan = Plan(methods=("live",), repeats=2, vary={"time_threads": (True, False)})
    for round_ in range(2):
        on = [s.case.scenario.instruments.time_threads for s in slots(plan) if s.round == round_]
        assert sorted(on) == [False, True]
    assert {s.case.name for s in slots(plan)} == {"live, time_threads=yes", "live, time_threads=no"}
    without = Plan(methods=("live",), instruments=Instruments(log_faults=False))
    assert "not log_faults" in describe(without)[0]
    assert "rebuild_huge_pages" not in describe(without)[0]


def test_a_description_gives_no_one_value_of_what_is_varied() -> None:
    head = describe(Plan(methods=("live",), vary={"ram_mib": (512, 2048), "wss_mib": (8, 16)}))[0]
    assert "1024 MiB" not in head
    assert "256 MiB" not in head
    assert "1 vCPU, tcg; random;" in head
    assert head.count("varied") == 2


def test_a_set_that_names_no_instruments_is_measured_again_with_those_of_its_time() -> None:
    recorded = load_set(TEST_DATA / "synthetic-run-set-schema-1")
    found = dataclasses.asdict(plan_of(recorded).instruments)
    assert [name for name, value in found.items() if value is True] == ["log_faults"]


async def test_a_comparison_names_the_instruments_that_differ(tmp_path: Path) -> None:
    plan = Plan(methods=("live",), repeats=1, vary={"log_faults": (True, False)})
    done = await campaign(tmp_path / "set", FakeSampler(), plan)
    left, right = sides(done, done, *done.cases)[0]
    assert "log_faults: True -> False" in comparison_text(left, right)


async def test_storage_of_several_rates_is_measured_side_by_side_and_named(tmp_path: Path) -> None:
    plan = Plan(methods=("live",), repeats=1, vary={"storage_mib_per_s": (0, 100)})
    assert "storage_mib_per_s varied" in describe(plan)[0]
    done = await campaign(tmp_path / "set", FakeSampler(), plan)
    assert plan_of(done) == plan
    slow = "live, storage_mib_per_s=100"
    assert {r.case: r.summary["storage_mib_per_s"] for r in done} == {
        "live, storage_mib_per_s=0": 0,
        slow: 100,
    }
    left, right = sides(done, done, "live, storage_mib_per_s=0", slow)[0]
    assert "storage_mib_per_s: 0 -> 100" in comparison_text(left, right)
    assert "image at 100/unlimited MiB/s" in stamp_text(done)
    assert "image at 100 MiB/s" in stamp_text(done.only(storage_mib_per_s=100))
    assert "image at" not in stamp_text(done.only(storage_mib_per_s=0))


async def test_guests_of_several_rates_are_measured_side_by_side_and_named(tmp_path: Path) -> None:
    plan = Plan(methods=("live",), repeats=1, vary={"rate_ops_per_s": (5000, 0)})
    assert "rate_ops_per_s varied" in describe(plan)[0]
    done = await campaign(tmp_path / "set", FakeSampler(), plan)
    assert plan_of(done) == plan
    paced, full = "live, rate_ops_per_s=5000", "live, rate_ops_per_s=0"
    assert {r.case: r.summary["rate_ops_per_s"] for r in done} == {paced: 5000, full: 0}
    left, right = sides(done, done, paced, full)[0]
    assert "rate_ops_per_s: 5000 -> 0" in comparison_text(left, right)
    assert "5000/unlimited operations/s" in stamp_text(done)
    assert "5000 operations/s" in stamp_text(done.only(rate_ops_per_s=5000))
    assert "operations/s" not in stamp_text(done.only(rate_ops_per_s=0))
    workload = Workload(rate_ops_per_s=5000)
    assert "5000 operations/s" in describe(Plan(methods=("live",), workload=workload))[0]


def test_a_plan_says_how_fast_the_storage_is_and_refuses_what_can_not_use_it() -> None:
    storage = Storage(storage_mib_per_s=100)
    assert "image at 100 MiB/s" in describe(Plan(methods=("live",), storage=storage))[0]
    assert "image at" not in describe(PLAN)[0]
    with pytest.raises(UsageError, match="live-mapped writes here and there"):
        Plan(methods=("live", "live-mapped"), vary={"storage_mib_per_s": (0, 100)})


def test_warm_up_rounds_come_first_and_are_marked() -> None:
    planned = slots(Plan(methods=("background",), repeats=2, warmups=1))
    assert [(s.round, s.warmup) for s in planned] == [(-1, True), (0, False), (1, False)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ()}, "no method"),
        ({"methods": ("background", "background")}, "named twice"),
        ({"repeats": 0}, "fewer than one"),
        ({"methods": ("teleport",)}, "unknown method"),
        ({"vary": {"vcpus": ()}}, "no value"),
        ({"vary": {"vcpus": (1, 2, 1)}}, "twice"),
        ({"vary": {"colour": ("red",)}}, "no parameter 'colour'"),
        ({"vary": {"wss_mib": (64, 4096)}}, "does not fit"),
    ],
)
def test_a_plan_that_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Plan(**({"methods": ("background",)} | changes))


async def test_a_campaign_measures_in_the_planned_order_and_seals_the_set(tmp_path: Path) -> None:
    sampler = FakeSampler()
    done = await campaign(tmp_path / "set", sampler)
    assert sampler.seen == [slot.case.name for slot in slots(PLAN)]
    assert [r.record.method for r in done] == sampler.seen
    assert load_set(tmp_path / "set").complete
    assert done.runs[0].record.binaries["qemu"]["build_id"] in "pu"


async def test_a_failed_run_is_recorded_without_figures_and_the_campaign_goes_on(
    tmp_path: Path,
) -> None:
    sampler = FakeSampler({1: SnapshotError(f"disk full: {tmp_path}/x.snap", "free some")})
    done = await campaign(tmp_path / "set", sampler)
    failed = done.runs[1]
    assert len(done) == 12
    assert failed.record.outcome == "failed"
    # Published with the set: says what, not where on this machine.
    assert failed.record.reason == "disk full: x.snap; free some"
    assert failed.summary["reason"] == failed.record.reason
    assert all(failed.summary[metric] is None for metric in METRICS)
    assert failed not in done.measured()


async def test_figures_of_a_run_that_failed_late_are_not_kept(tmp_path: Path) -> None:
    late = Sample(
        outcome="failed", reason="RAM differs", figures={"pause_ms": 2.0, "verified": False}
    )
    done = await campaign(tmp_path / "set", FakeSampler({0: late}))
    assert done.runs[0].summary["pause_ms"] is None
    assert done.runs[0].summary["verified"] is False


async def test_what_will_fail_again_ends_the_campaign_and_leaves_it_resumable(
    tmp_path: Path,
) -> None:
    with pytest.raises(HostError):
        await campaign(tmp_path / "set", FakeSampler({2: HostError("no userfaultfd")}))
    left = load_set(tmp_path / "set")
    assert len(left) == 2
    assert not left.complete


async def test_an_interrupted_campaign_is_continued_where_it_stopped(tmp_path: Path) -> None:
    with pytest.raises(asyncio.CancelledError):
        await campaign(tmp_path / "set", FakeSampler({5: asyncio.CancelledError()}))
    first = [r.record.id for r in load_set(tmp_path / "set")]
    rest = FakeSampler()
    done = await campaign(tmp_path / "set", rest)
    assert len(first) == 5
    assert rest.seen == [slot.case.name for slot in slots(PLAN)][5:]
    assert [r.record.id for r in done][:5] == first
    assert done.complete


async def test_a_set_is_not_continued_with_another_plan_or_other_builds(tmp_path: Path) -> None:
    open_set(tmp_path / "set", PLAN, GROUND)
    other = Plan(methods=PLAN.methods, repeats=5, seed=7)
    with pytest.raises(RunError, match=r"another plan \(order, repeats differ\)"):
        open_set(tmp_path / "set", other, GROUND)
    rebuilt = Ground(host=GROUND.host, binaries={"patched": {"build_id": "q"}})
    with pytest.raises(RunError, match="other builds"):
        open_set(tmp_path / "set", PLAN, rebuilt)


def test_a_set_begun_in_another_order_names_the_flag_that_continues_it(tmp_path: Path) -> None:
    open_set(tmp_path / "set", PLAN, GROUND)
    with pytest.raises(RunError, match=r"order, seed differ.*give .* with --order-seed 7$"):
        open_set(tmp_path / "set", dataclasses.replace(PLAN, seed=1), GROUND)


async def test_a_complete_set_is_not_measured_again(tmp_path: Path) -> None:
    await campaign(tmp_path / "set", FakeSampler())
    with pytest.raises(RunError, match="complete"):
        await campaign(tmp_path / "set", FakeSampler())


async def test_the_plan_of_a_set_can_be_measured_again(tmp_path: Path) -> None:
    assert plan_of(await campaign(tmp_path / "set", FakeSampler())) == PLAN


def test_progress_counts_what_is_there_and_estimates_what_is_left(tmp_path: Path) -> None:
    seen: list[tuple[int, int, float]] = []
    asyncio.run(
        measure(
            PLAN,
            tmp_path / "set",
            image_dir=tmp_path,
            ground=GROUND,
            sampler=FakeSampler(),
            on_start=lambda p: seen.append((p.done, p.total, p.remaining_s)),
        )
    )
    assert [done for done, _, _ in seen] == list(range(12))
    assert {total for _, total, _ in seen} == {12}
    assert all(left >= 0 for _, _, left in seen)


def test_the_summary_line_has_every_field_and_null_for_what_does_not_apply() -> None:
    scenario = Scenario(method="stop-and-copy", workload=Workload("idle"))
    line = summarise(scenario, Sample(outcome="ok", figures={"pause_ms": np.float64(3.5)}))
    assert list(line) == list(SUMMARY_FIELDS)
    assert line["pause_ms"] == 3.5
    assert line["engine"] is None
    assert line["wss_mib"] is None
    assert (line["disk"], line["disk_cache"], line["net"]) == ("none", None, False)
    assert line["storage_mib_per_s"] == line["rate_ops_per_s"] == 0
    assert line["verified"] is None


def test_a_dry_run_says_how_many_runs_and_in_which_order() -> None:
    head, *lines = describe(PLAN)
    assert head.startswith("12 runs: 4 x 3 methods")
    assert [line.split()[-1] for line in lines] == [slot.case.name for slot in slots(PLAN)]


def ramp(*rates: float) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Progress with each rate held for 250 ms, a sample a millisecond."""
    steps = np.repeat(rates, 250)
    t = np.arange(len(steps) + 1) * 1_000_000 + 10**15
    return t, np.concatenate([[0], np.cumsum(steps)])


def test_settled_is_an_even_rate_and_not_a_stopped_guest() -> None:
    assert is_settled(*ramp(1000, 1000, 1000))
    assert not is_settled(*ramp(500, 800, 1000))
    assert not is_settled(*ramp(0, 0, 0))
    assert not is_settled(*ramp(1000))
    assert is_settled(*ramp(10, 500, 1000, 1000, 990))


def test_a_sampler_that_slept_is_told_of() -> None:
    t = np.concatenate([np.arange(100), np.arange(130, 200)]) * 1_000_000
    df = pd.DataFrame({"t_ns": t, "ops": np.arange(len(t)), "read_ns": 0})
    warnings = sampler_warnings(df, 0, 200_000_000)
    assert warnings == ["the progress sampler slept 1 times over 10 ms, 31 ms at most"]
    assert sampler_warnings(df, 0, 90_000_000) == []


def test_too_little_room_for_an_image_is_refused_before_anything_boots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        # The last 5 % are not to be had.
        total, free = 1000 << 20, 150 << 20

    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage)
    with pytest.raises(HostError, match=r"an image needs \d+ MiB in .* and 100 MiB are free"):
        check_room(tmp_path, Machine().ram_mib)


def test_the_file_system_of_a_folder_has_a_name(tmp_path: Path) -> None:
    assert filesystem_of(tmp_path)
    assert filesystem_of(Path("/proc/self")) == "proc"


Make = Callable[..., RunSet]


async def test_garbage_collection_is_off_inside_and_as_before_outside() -> None:
    import gc

    before = gc.isenabled()
    with no_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled() == before


@pytest.mark.parametrize("keep_images", [False, True])
async def test_images_are_in_the_cache_and_go_unless_they_are_to_be_kept(
    keep_images: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    used: list[Path] = []

    async def fake_measure(plan: Plan, out: Path, *, image_dir: Path, **_rest: object) -> RunSet:
        used.append(image_dir)
        image_dir.joinpath("left.snap").touch()
        assert image_dir.stat().st_mode & 0o077 == 0
        return create_set(out, plan={}, host={}, binaries={}, lab={})

    monkeypatch.setattr("lab.measure.campaign.measure", fake_measure)
    monkeypatch.setattr("lab.measure.ground.survey", lambda plan, fallback: GROUND)
    await run_campaign(PLAN, tmp_path / "set", keep_images=keep_images)
    (folder,) = used
    assert folder.parent == tmp_path / "cache"
    assert folder.exists() == keep_images
    with pytest.raises(HostError, match="no folder"):
        await run_campaign(PLAN, tmp_path / "set", image_dir=tmp_path / "missing")
