"""Condensed tables, comparisons and the report: numbers come from the runs, caveats are said."""

from collections.abc import Callable

import pandas as pd
import pytest

from lab.__main__ import main
from lab.analysis.compare import Side, comparison_text, sides
from lab.analysis.warnings import warnings_of
from lab.display import text_table
from lab.errors import RunError
from lab.runs.columns import METRICS, SUMMARY_FIELDS, definitions
from lab.runs.methods import df_methods, df_readable
from lab.runs.records import RunRecord
from lab.runs.sets import RunSet

MakeSet = Callable[..., RunSet]
MakeRecord = Callable[..., RunRecord]


def test_one_row_a_method_with_the_median_over_boots(make_synthetic_set: MakeSet) -> None:
    made = make_synthetic_set(repeats=3)
    table = df_methods(made).set_index("method")
    assert list(table.index) == ["live-rfc", "background", "migrate-to-file"]
    durations = sorted(r.summary["duration_ms"] for r in made.measured("background"))
    row = table.loc["background"]
    assert row["n"] == 3
    assert (row["duration_ms_low"], row["duration_ms"], row["duration_ms_high"]) == tuple(durations)
    assert table["faults"].isna()["background"]
    assert table.loc["live-rfc", "faults"] == 307


def test_failed_runs_are_counted_and_do_not_count(
    make_synthetic_set: MakeSet, make_record: MakeRecord
) -> None:
    made = make_synthetic_set(finish=False)
    made.append(make_record("background", 40, outcome="failed", reason="disk full"), {})
    table = df_methods(made).set_index("method")
    assert table.loc["background", "n"] == 2
    assert table.loc["background", "failed"] == 1
    assert "failed" in df_readable(df_methods(made)).columns
    assert any("disk full" in warning for warning in warnings_of(made))


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("pause_ms", 1.23456, "1.23"),
        ("duration_ms", 1838.4, "1838"),
        ("image_bytes", 352474563, "336"),
        ("min_rate_50ms", 0.00443, "0.443"),
        ("lost_work_ms", -3.21, "-3.21"),
        ("faults", 0, "0"),
        ("faults", None, "-"),
        ("faults", float("nan"), "-"),
    ],
)
def test_values_are_shown_with_three_digits(metric: str, value: float | None, text: str) -> None:
    assert METRICS[metric].shown(value) == text


def test_every_metric_has_a_heading_and_a_definition() -> None:
    for name, metric in METRICS.items():
        assert metric.title != name or name == "faults"
        assert metric.doc
        assert SUMMARY_FIELDS[name] is metric
    assert set(definitions()["field"]) == set(SUMMARY_FIELDS)


def test_runs_and_sets_show_a_table_in_a_notebook(
    make_synthetic_set: MakeSet, make_record: MakeRecord
) -> None:
    made = make_synthetic_set(repeats=1, finish=False)
    failed = made.append(make_record("background", 40, outcome="failed", reason="no"), {})
    whole = made._repr_html_()
    assert all(text in whole for text in ("live-rfc", "migrate-to-file", "pause ms", "307"))
    one = made.runs[0]._repr_html_()
    assert one.startswith("<table>")
    assert all(f"<td>{text}</td>" in one for text in (made.runs[0].name, "ok", "2.00", "307"))
    assert "<td>failed</td><td>-</td>" in failed._repr_html_()


def test_text_tables_line_up() -> None:
    text = text_table(pd.DataFrame({"a": ["x", "long"], "b": ["1", "22"]}))
    assert text.splitlines() == ["a      b", "x      1", "long  22"]


def test_lower_bounds_are_said(make_synthetic_set: MakeSet, make_record: MakeRecord) -> None:
    made = make_synthetic_set(repeats=1, finish=False)
    assert not any("lower bound" in warning for warning in warnings_of(made))
    capped = made.runs[0].summary | {"back_capped": True, "recovery_ms": 5000.0}
    made.append(make_record("live-rfc", 30, summary=capped), {})
    said = [warning for warning in warnings_of(made) if "old rate" in warning]
    assert len(said) == 1
    assert said[0].startswith("live-rfc: in 1 of 2 boots")
    assert "lower bound" in said[0]


def test_long_recoveries_are_counted_by_method(
    make_synthetic_set: MakeSet, make_record: MakeRecord
) -> None:
    made = make_synthetic_set(repeats=1, finish=False)
    assert not any("old rate" in warning for warning in warnings_of(made))
    for order, recovery_ms in enumerate((4900.0, 2100.0, 2000.0), start=30):
        late = made.runs[1].summary | {"recovery_ms": recovery_ms}
        made.append(make_record("background", order, summary=late), {})
    said = [warning for warning in warnings_of(made) if "old rate" in warning]
    assert len(said) == 1
    assert said[0].startswith("background: in 2 of 4 boots the old rate took over 2 s from")


def test_a_comparison_names_only_what_differs(make_synthetic_set: MakeSet) -> None:
    a, b = make_synthetic_set("a", seed=1), make_synthetic_set("b", seed=2)
    pairs = sides(a, b, None, None)
    assert [left.name for left, _ in pairs] == ["a:live-rfc", "a:background", "a:migrate-to-file"]
    text = comparison_text(*pairs[0])
    assert "ram_mib" not in text
    assert "build:" not in text
    assert "too few" in text
    across = comparison_text(*sides(a, b, "live-rfc", "background")[0])
    assert "method: live-rfc -> background" in across


def test_a_comparison_names_what_backs_the_ram_where_that_differs(
    make_synthetic_set: MakeSet, make_record: MakeRecord
) -> None:
    a, b = make_synthetic_set("a"), make_synthetic_set("b", finish=False)
    scenario = {"machine": {"ram_mib": 128, "ram_kind": "memfd"}}
    changed = make_record("live-rfc", 40, scenario=scenario, summary=a.runs[0].summary)
    left = Side("a", [a.runs[0]])
    right = Side("b", [b.append(changed, {})])
    text = comparison_text(left, right)
    assert "ram_kind: anon -> memfd" in text
    assert "thp" not in text


def test_sets_without_a_common_method_are_refused(make_synthetic_set: MakeSet) -> None:
    a = make_synthetic_set("a", methods=("live-rfc",))
    b = make_synthetic_set("b", methods=("background",))
    with pytest.raises(RunError, match="no method in common"):
        sides(a, b, None, None)
    with pytest.raises(RunError, match="no run of background that counts"):
        sides(a, a, "background", None)


def test_compare_command_takes_sets_and_methods(
    make_synthetic_set: MakeSet, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_synthetic_set().path
    assert main(["compare", f"{path}:background", f"{path}:live-rfc"]) == 0
    assert "method: background -> live-rfc" in capsys.readouterr().out
    assert main(["compare", str(path), str(path.parent / "none")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("lab: error: cannot read")
    assert error.count("\n") == 1
