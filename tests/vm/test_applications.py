"""One round of an application on the lab's Debian: every request is accounted for, and nothing is
left behind.
"""

import asyncio
import dataclasses
from pathlib import Path

import pytest

from lab.analysis.applications import df_applications, requests_of
from lab.analysis.requests import AFTER_NS, request_summary
from lab.errors import HostError
from lab.guests.debian.build import find_debian
from lab.measure.applications.bench import booted_bench
from lab.measure.applications.campaign import measure_applications, survey
from lab.measure.applications.steps import STEPS
from lab.runs.sets import load_set
from lab.scenario.applications import ApplicationsPlan

pytestmark = [pytest.mark.platforms("tcg"), pytest.mark.vm, pytest.mark.thorough]


async def test_a_round_accounts_for_every_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        find_debian()
    except HostError as error:
        pytest.skip(str(error))
    layers = tmp_path / "layers"
    monkeypatch.setenv("LAB_LAYERS_DIR", str(layers))
    images = tmp_path / "images"
    images.mkdir()
    plan = ApplicationsPlan(
        application="redis-set", methods=("live", "none"), rounds=1, clients=5, keys=1000
    )
    began = []
    await measure_applications(
        plan,
        tmp_path / "set",
        image_dir=images,
        ground=await survey(plan),
        on_start=lambda progress: began.append(progress.turn.method),
    )
    assert sorted(began) == ["live", "none"]
    assert list(images.iterdir()) == []
    found = load_set(tmp_path / "set")
    assert found.kind == "applications"
    assert found.plan == plan
    for run in found:
        assert run.record.outcome == "ok", run.record.reason
        marks, table = run.record.marks, requests_of(run)
        assert marks.request_ns is not None
        assert marks.end_ns is not None
        last_ns = marks.end_ns + AFTER_NS
        # What is stored one by one says the same as what was computed of all of it.
        again = request_summary(table, marks)
        for name in ("requests", "refused_requests", "censored_requests", "request_worst_ms"):
            assert run.summary[name] == getattr(again, name)
        assert run.summary["refused_requests"] == 0
        assert run.summary["requests"] > 0
        # A connection has one request at a time: all of them are busy at any instant.
        for t_ns in (marks.request_ns, marks.end_ns):
            busy = (table["due_ns"] <= t_ns) & (table["due_ns"] + table["latency_ns"] > t_ns)
            assert busy.sum() == plan.connections
        bins = run.df("throughput")
        done = table.loc[table["ok"], "done_ns"]
        binned = bins.loc[(bins["bin"] >= 0) & (bins["bin"] < run.summary["duration_ms"] // 10)]
        span_ns = len(binned) * 10_000_000
        inside = (done >= marks.request_ns) & (done < marks.request_ns + span_ns)
        assert binned["requests"].sum() == inside.sum()
        # The load went on until after the window.
        assert (table["due_ns"] <= last_ns).all()
        assert (table["due_ns"] + table["latency_ns"]).max() >= last_ns
        assert run.log("requests.hlog").startswith(b"#[")
    by_method = {run.record.method: run for run in found}
    live, none = by_method["live"], by_method["none"]
    assert live.record.marks.stop_ns is not None
    assert live.summary["pause_ms"] > 0
    assert live.summary["image_bytes"] > 1 << 20
    assert none.record.marks.stop_ns is None
    assert none.summary["pause_ms"] is None
    assert none.summary["image_bytes"] is None
    medians = df_applications(found)
    assert list(medians["method"]) == ["live", "none"]
    assert list(medians["n"]) == [1, 1]


async def test_steps_of_the_guests_own_work_are_counted(tmp_path: Path) -> None:
    try:
        find_debian()
    except HostError as error:
        pytest.skip(str(error))
    plans = [ApplicationsPlan(application=name, methods=("live",)) for name in STEPS]
    async with booted_bench(plans[0], "patched") as first:
        for plan in plans:
            bench = dataclasses.replace(first, plan=plan)
            await first.vm.shell(STEPS[plan.application].prepare(0))
            async with bench.load(seed=1) as load:
                await load.wait_requests(3, 120)
                await first.vm.snapshot(tmp_path / "a.snap", "live", checksums=False)
                await load.wait_requests(load.completed + 2, 120)
            assert load.df()["ok"].sum() == load.completed > 4
        # Each loop ends with its connection, at its next line.
        running = "ps -eo comm= | grep -Ex 'awk|mawk|sqlite3|fio|gcc' | wc -l"
        for _ in range(60):
            if (await first.vm.shell(running)).strip() == "0":
                break
            await asyncio.sleep(1)
        assert (await first.vm.shell(running)).strip() == "0"
