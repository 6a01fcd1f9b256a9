"""The report is one page that says all of a set, and escapes whatever people typed."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from lab.__main__ import main
from lab.report.report import FIGURES, render_beside, render_report
from lab.runs.columns import SUMMARY_FIELDS
from lab.runs.records import RunRecord
from lab.runs.sets import RunSet, create_set, load_set
from tests.support.paths import ROOT

MakeSet = Callable[..., RunSet]
MakeRecord = Callable[..., RunRecord]


def test_report_is_one_file_that_refers_to_nothing_outside(
    make_synthetic_set: MakeSet, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_synthetic_set(repeats=3)
    assert main(["report", str(made.path)]) == 0
    path = Path(capsys.readouterr().out.strip())
    text = path.read_text(encoding="utf-8")
    assert path == made.path.with_name("synthetic.html")
    drawn = [figure for figure in FIGURES if figure.missing(made) is None]
    assert len(drawn) > 4
    assert text.count("data:image/png;base64,") == len(drawn)
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    assert "<script" not in text
    for must in (*SUMMARY_FIELDS, "SYNTHETIC", "made up", "0.0.0", "002-migrate-to-file", "caveat"):
        assert must.lower() in text.lower(), must


def test_report_says_the_same_for_the_same_set(make_synthetic_set: MakeSet) -> None:
    made = make_synthetic_set()
    assert render_report(made) == render_report(load_set(made.path))


@pytest.mark.parametrize(
    ("scenario", "says"),
    [
        ({"workload": {"rate_ops_per_s": 5000}}, "what those cost it is not in the lost work"),
        ({"storage": {"storage_mib_per_s": 50}}, "at a limited rate"),
    ],
)
def test_report_says_what_pacing_and_slow_storage_hide_where_there_were_any(
    tmp_path: Path,
    make_record: MakeRecord,
    make_synthetic_set: MakeSet,
    scenario: dict[str, dict[str, int]],
    says: str,
) -> None:
    assert says not in render_report(make_synthetic_set())
    made = create_set(tmp_path / "s", plan={}, host={}, binaries={}, lab={})
    made.append(make_record("background", 0, outcome="failed", scenario=scenario), {})
    assert says in render_report(made)


def test_report_escapes_what_people_typed(tmp_path: Path, make_record: MakeRecord) -> None:
    made = create_set(
        tmp_path / "s", plan={}, host={}, binaries={}, lab={}, note="<b>mine & yours</b>"
    )
    made.append(make_record("background", 0, outcome="failed", reason="<i>why</i>"), {})
    text = render_report(made)
    assert "<b>mine" not in text
    assert "<i>why" not in text
    assert "&lt;b&gt;mine &amp; yours" in text
    assert "no run that counts" in text


def test_report_escapes_a_name_and_a_host_as_well(tmp_path: Path, make_record: MakeRecord) -> None:
    typed = "<script>alert(1)</script>"
    made = create_set(
        tmp_path / "<i>mine", plan={"note": typed}, host={"cpu": typed}, binaries={}, lab={}
    )
    made.append(make_record("background", 0), {})
    text = render_report(made)
    assert "<script" not in text
    assert "<i>mine" not in text
    assert text.count("&lt;i&gt;mine") >= 2
    assert text.count("&lt;script&gt;alert(1)") >= 2


def test_report_has_title_caption_and_limits_of_each_figure_that_a_set_has_data_for(
    make_synthetic_set: MakeSet,
) -> None:
    made = make_synthetic_set(repeats=3)
    text = " ".join(render_report(made).split()).replace("&#39;", "'")
    shown = [plot for plot in FIGURES if plot.missing(made) is None]
    assert 0 < len(shown) < len(FIGURES)
    for plot in FIGURES:
        assert (f"<h2>{plot.text.title}</h2>" in text) is (plot in shown)
        assert (plot.text.below in text) is (plot in shown)
    assert text.index(shown[0].text.title) < text.index(shown[-1].text.title)


def test_no_figure_stays_open_when_a_report_is_written(make_synthetic_set: MakeSet) -> None:
    before = plt.get_fignums()
    render_report(make_synthetic_set(repeats=3))
    assert plt.get_fignums() == before


def test_figures_stand_beside_each_other_and_a_missing_one_is_said_to_be(tmp_path: Path) -> None:
    here = tmp_path / "a<b>.png"
    here.write_bytes(b"png")
    text = render_beside([(tmp_path / "none.png", here)])
    assert "a&lt;b&gt;" in text
    assert "a<b>" not in text
    assert text.count("no such figure") == text.count("<img") == 1


def test_the_templates_are_part_of_an_installation() -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"lab.report" = ["*.j2"]' in declared
    for template in (ROOT / "lab" / "report").glob("*.j2"):
        assert "| safe" not in template.read_text().replace("| table | safe", "").replace(
            '| table("text") | safe', ""
        )
