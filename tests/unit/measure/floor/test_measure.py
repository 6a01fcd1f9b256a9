"""Recording a floor: real rounds, small ones, into a real run set."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

import lab.__main__ as command_line
from lab.analysis.compare import sides
from lab.analysis.floor import KEYS, df_floor, df_floor_medians, df_floor_readable, label, skipped
from lab.errors import LabError, RunError
from lab.figures.floor import plot_floor, plot_floor_bulk, plot_floor_faults
from lab.host.probe import UffdProbe, probe_uffd
from lab.measure.campaign import plan_of
from lab.measure.floor import measure as floor_measure
from lab.measure.floor.build import ensure_program
from lab.measure.floor.measure import Progress, measure_floor, survey
from lab.measure.floor.program import Output
from lab.measure.ground import Ground
from lab.report.report import render_report
from lab.runs.columns import COLUMNS
from lab.runs.records import RunRecord, jsonable
from lab.runs.sets import RunSet, create_set, load_set
from lab.scenario.floor import FloorPlan, all_blocks

needs_uffd = pytest.mark.skipif(not probe_uffd().usable, reason="userfaultfd is not permitted")
SMALL = ["--mib", "8", "--write-mib", "8", "--samples", "7"]
SCAN = FloorPlan(benchmarks=("scan",), repeats=3, mib=8, write_mib=8)
GROUND = Ground(host={"cpu_model": "made up"}, binaries={"floor": {"sha256": "0"}})


async def record(
    out: Path, plan: FloorPlan = SCAN, on_start: Callable[[Progress], None] | None = None
) -> RunSet:
    program = await ensure_program()
    return await measure_floor(
        plan, out, image_dir=out.parent, program=program, ground=GROUND, on_start=on_start
    )


def floor_table(rows: list[dict[str, object]]) -> pd.DataFrame:
    """Rows of the table `floor`, with what they leave out filled in."""
    common = {"block": 0, "variant": "sweep", "stage": "call", "ram_kind": "anon-4k"}
    common |= {"target": None, "busy_threads": 0}
    filled = [common | {"sample": k} | row for k, row in enumerate(rows)]
    return pd.DataFrame(filled)[list(COLUMNS["floor"])].astype(
        {column.name: column.dtype for column in COLUMNS["floor"].values()}
    )


@pytest.fixture
def made_up(tmp_path: Path, make_record: Callable[..., RunRecord]) -> RunSet:
    """Three rounds of a release of 64 pages and of writes, and a fourth that failed."""
    made = create_set(
        tmp_path / "made-up",
        plan={"kind": "floor", "methods": ["floor"]},
        host={"cpu_model": "made up", "kernel": "0"},
        binaries={},
        lab={},
    )
    for round_, factor in enumerate((1, 3, 2)):
        rows: list[dict[str, object]] = [
            {"benchmark": "unprotect", "pages": 64, "value_ns": 1000 * factor * k}
            for k in (1, 2, 90)
        ]
        file = {"variant": "fresh", "ram_kind": None, "target": "tmpfs", "pages": 512}
        rows += [
            {"benchmark": "write", "stage": "write", "value_ns": 1_000_000 * factor * k} | file
            for k in (1, 1, 7)
        ]
        summary = {"skipped": {"arm populated hugetlb": "no pages"}}
        one = make_record("floor", round_, round=round_, kind="floor", summary=summary)
        made.append(one, {"floor": floor_table(rows)})
    failed = make_record(
        "floor", 3, round=3, kind="floor", outcome="failed", reason="it died", summary={}
    )
    made.append(failed, {})
    made.finish()
    return made


def test_a_round_is_its_median_and_of_writes_the_whole(made_up: RunSet) -> None:
    medians = df_floor_medians(made_up)
    assert list(medians["benchmark"]) == ["unprotect", "write"]
    assert list(medians["n"]) == [3, 3]
    assert list(medians["samples"]) == [9, 9]
    assert list(medians["median_us"]) == [4.0, 6000.0]
    assert list(medians["low_us"]) == [2.0, 3000.0]
    assert list(medians["high_us"]) == [6.0, 9000.0]
    # 4 us for 64 of 262144 pages; 6 ms for 2 MiB.
    assert list(medians["ms_per_gib"]) == [pytest.approx(16.384), pytest.approx(3072.0)]
    assert medians["ram_kind"].tolist() == ["anon-4k", None]


def test_the_table_for_people_says_what_was_not_measured_and_what_failed(
    made_up: RunSet,
) -> None:
    table = df_floor_readable(made_up)
    first = table.iloc[0].to_dict()
    assert first["us"] == "4.00 [2.00 - 6.00]"
    assert first["ms/GiB"] == "16.4"
    assert table["memory or file"].tolist() == ["anon-4k", "tmpfs"]
    assert table["GiB/s"].tolist() == ["-", "0.326"]
    assert skipped(made_up) == [
        "003-floor is failed: it died",
        "arm populated hugetlb was not measured: no pages",
    ]


def test_figures_show_the_medians(made_up: RunSet) -> None:
    medians = df_floor_medians(made_up)
    ax = plot_floor(medians)
    points = [line for line in ax.get_lines() if line.get_marker() == "o"]
    assert [np.asarray(line.get_xdata())[0] for line in points] == [4.0, 6000.0]
    assert plot_floor_faults.missing(made_up) == "made-up has not timed write faults"
    bulk = plot_floor_bulk(made_up)
    points = [line for line in bulk.get_lines() if line.get_marker() == "o"]
    assert np.asarray(points[1].get_xdata())[0] == pytest.approx(3072.0)
    assert [text.get_text() for text in bulk.get_yticklabels()] == [
        "release 64 pages, anon-4k",
        "write 2 MiB, fresh, tmpfs",
    ]
    plt.close("all")


def test_the_report_on_a_floor_shows_its_table(made_up: RunSet) -> None:
    text = render_report(made_up)
    assert "The floor: made-up" in text
    assert "4.00 [2.00 - 6.00]" in text
    assert "it died" in text
    assert text.count("data:image/png") == 1
    assert all(f"<td>{text}</td>" in made_up._repr_html_() for text in ("made-up", "floor"))


def test_what_is_for_snapshots_refuses_a_floor_in_one_line(
    made_up: RunSet, make_synthetic_set: Callable[..., RunSet]
) -> None:
    with pytest.raises(RunError, match="is a floor"):
        sides(make_synthetic_set(), made_up, None, None)
    with pytest.raises(RunError, match="use `lab floor`"):
        plan_of(made_up)
    with pytest.raises(RunError, match="holds snapshots"):
        df_floor(make_synthetic_set(name="another"))


def test_every_step_has_a_label_of_its_own() -> None:
    seen = set()
    for block in all_blocks():
        stages = {
            "fault": ("fault", "deliver", "unprotect", "return"),
            "write": ("write", "close", "sync"),
        }.get(block.benchmark, ("call",))
        for stage in stages:
            row = {key: getattr(block, key, None) for key in KEYS}
            row |= {"stage": stage, "pages": block.chunk_pages or 512}
            seen.add((label(row), block.ram_kind, block.target))
    per_block = {"fault": 4, "write": 3}
    assert len(seen) == sum(per_block.get(block.benchmark, 1) for block in all_blocks())


async def test_an_interrupted_recording_is_continued(tmp_path: Path) -> None:
    out = tmp_path / "set"

    def stop_in_the_second_round(progress: Progress) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await record(out, on_start=stop_in_the_second_round)
    partial = load_set(out)
    assert [one.record.order for one in partial] == [0]
    assert not partial.complete

    seen: list[Progress] = []
    done = await record(out, on_start=seen.append)
    assert done.complete
    assert [one.record.round for one in done] == [0, 1, 2]
    assert done.runs[0].record.id == partial.runs[0].record.id
    assert [progress.round for progress in seen] == [1, 1, 2, 2]
    assert {progress.total for progress in seen} == {4}
    # Nothing that was written, or logged, is left.
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    with pytest.raises(RunError, match="complete"):
        await record(out)


async def test_figures_that_are_not_to_be_trusted_are_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def wrong(*_arguments: object) -> Output:
        raise LabError("30 faults and 31 pages_written", "do not use the figures")

    monkeypatch.setattr(floor_measure, "run_block", wrong)
    done = await record(tmp_path / "set")
    assert [one.record.outcome for one in done] == ["failed"] * 3
    assert not any(one.has("floor") for one in done)
    assert "30 faults" in str(done.runs[0].record.reason)
    assert df_floor_medians(done).empty
    assert "30 faults" in render_report(done)


async def test_a_host_that_can_do_nothing_of_it_still_gives_a_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*_arguments: object) -> Output:
        return Output(counts={}, skipped="not here")

    monkeypatch.setattr(floor_measure, "run_block", nothing)
    done = await record(tmp_path / "set")
    assert all(one.ok for one in done)
    assert len(df_floor(done)) == 0
    assert all(reason.endswith("not here") for reason in skipped(done))


@needs_uffd
async def test_the_host_is_recorded_without_where_anything_lies(tmp_path: Path) -> None:
    program = await ensure_program()
    ground = survey(SCAN, program, tmp_path)
    assert ground.host["image_filesystem"]
    assert set(ground.binaries["floor"]) == {"sha256", "source_sha256", "compiler", "flags"}
    assert str(program.path.parent) not in json.dumps(jsonable(ground.binaries))


@needs_uffd
def test_a_small_floor_is_measured_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    command = ["floor", *SMALL, "--repeats", "1", "--json", "--note", "a test"]
    command += ["--image-dir", str(tmp_path), "--out", str(out)]
    assert command_line.main(command) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(set(KEYS) < set(line) and line["n"] == 1 for line in lines)

    loaded = load_set(out)
    assert loaded.complete
    assert loaded.kind == "floor"
    (one,) = loaded
    assert one.record.kind == "floor"
    table = one.df("floor")
    assert list(table.columns) == list(COLUMNS["floor"])
    assert one.summary["samples"] == len(table)
    # What was not measured is named, and everything else was.
    measured = table.groupby("block", observed=True).ngroups
    assert measured + len(one.summary["skipped"]) == len(all_blocks())
    faults = table[(table["benchmark"] == "fault") & (table["stage"] == "fault")]
    assert (faults.groupby("block", observed=True).size() == 7).all()
    assert (table["value_ns"] > 0)[table["stage"] != "return"].all()

    assert command_line.main(["report", str(out), "-o", "-"]) == 0
    assert "a test" in capsys.readouterr().out


def test_a_host_without_userfaultfd_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forbidden = UffdProbe(access="none", problem="Operation not permitted")
    monkeypatch.setattr("lab.host.needs.probe_uffd", lambda: forbidden)
    out = tmp_path / "set"
    assert command_line.main(["floor", "--out", str(out), *SMALL]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("lab: error: userfaultfd cannot be used: Operation not permitted; ")
    assert "setfacl" in error
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["measure", "nonsense"],
        ["measure", "--method", "live", "floor"],
        ["measure", "--verify", "floor"],
        ["floor", "--method", "live"],
        ["floor", "--benchmark", "nonsense"],
        ["floor", "--mib", "1"],
    ],
)
def test_arguments_that_make_no_sense_together_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(arguments) == 2
    assert capsys.readouterr().err.startswith("lab: error: ")


def test_methods_are_measured_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["measure", "--method", "live", "--repeats", "2", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("live") == 2
    assert command_line.main(["floor", "--benchmark", "scan", "--dry-run"]) == 0
    assert "scan zeros anon-4k" in capsys.readouterr().out
