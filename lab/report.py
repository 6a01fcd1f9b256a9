"""One HTML file about a run set that can be mailed: no scripts, no links to anything outside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab import figures, plots
from lab.run import RunSet
from lab.summary import definitions, df_methods, df_readable, shown, warnings_of
from lab.tables import METRICS, df_runs

_CSS = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; color: #222; }
h1 { font-size: 1.6rem; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 0.8rem; display: block; overflow-x: auto; }
th, td { padding: 0.2rem 0.6rem; border-bottom: 1px solid #ddd; white-space: nowrap; }
th, td { text-align: right; }
td:first-child, th:first-child, table.text td, table.text th { text-align: left; }
table.text td { white-space: normal; }
img { max-width: 100%; display: block; margin: 0.8rem 0; }
.note { color: #555; font-size: 0.85rem; }
"""

# What the figures do not show, whatever the set.
_LIMITS = (
    "A sample is one boot. Faults of one boot are not independent of each other: quantiles "
    "over faults describe that "
    "boot, and only their spread over boots says how repeatable they are.",
    "Fault latency is the handler's side: from the fault message being read to the page being "
    "released. The guest waits "
    "longer: the fault's way to the handler and the wake-up of the vCPU come on top.",
    "Faults on pages that the sweep released while the fault was on its way count as faults "
    "but have no latency of their own.",
    "Lost work is time at the guest's own rate just before; a guest whose rate wanders by "
    "itself gains or loses some "
    "without any snapshot.",
    "The pause is QEMU's own (STOP to RESUME). What the guest lost around it is in max gap "
    "and lost work.",
    "After an ordinary migration the guest is continued by the lab as soon as completion is "
    "seen: its pause includes that reaction.",
    "Progress is sampled once a millisecond: stalls of under about 2 ms are not resolved.",
    "Figures are of one host and one guest. Nested virtualisation makes inter-processor "
    "interrupts, and with them "
    "releasing a page, several times dearer than on bare metal.",
)


def _png(axes: Axes | list[Axes]) -> str:
    figure = (axes[0] if isinstance(axes, list) else axes).get_figure()
    assert isinstance(figure, Figure)
    buffer = io.BytesIO()
    # Without the software's name in it the same data give the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return (
        f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    )


def _table(frame: pd.DataFrame, css: str = "") -> str:
    return str(frame.to_html(index=False, border=0, na_rep="-", classes=css, escape=True))


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            rows.append((prefix + key, ", ".join(map(str, value))))
        else:
            rows.append((prefix + key, "-" if value is None else str(value)))
    return rows


def _pairs(values: dict[str, Any]) -> str:
    return _table(pd.DataFrame(_flat(values), columns=["what", "value"]), "text")


def _every_run(run_set: RunSet) -> pd.DataFrame:
    frame = df_runs(run_set)
    table = frame[["run", "round", "warmup", "outcome", "verified"]].copy()
    table["verified"] = [{True: "yes", False: "NO"}.get(v, "-") for v in frame["verified"]]
    table["warmup"] = ["yes" if w else "" for w in frame["warmup"]]
    for metric in METRICS:
        table[metric] = [shown(metric, value) for value in frame[metric]]
    return table


def render_report(run_set: RunSet) -> str:
    """The report as one HTML document: summary, caveats, figures, every run, definitions, host
    and builds.

    Numbers are computed from the set; nothing is typed in.  A set without a run that counts gives
    a report that says so.
    """
    record = run_set.record
    title = html.escape(f"Live snapshots: {run_set.name}")
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        f"<title>{title}</title><style>{_CSS}</style></head><body><h1>{title}</h1>",
        f"<p class=note>{html.escape(plots.stamp_text(run_set))}</p>",
    ]
    if record.note:
        parts.append(f"<p>{html.escape(record.note)}</p>")
    if not run_set.complete:
        parts.append(
            "<p><b>This set is unfinished: methods may have different numbers of boots.</b></p>"
        )
    parts.append("<h2>Summary</h2>")
    parts.append(_table(df_readable(df_methods(run_set))))
    parts.append(
        "<p class=note>Median over boots [order-statistic interval of the median, at most 95 "
        "%; with fewer than six "
        "boots it is lowest to highest and covers less: 94 % at five, 75 % at three].</p>"
    )
    caveats = warnings_of(run_set)
    if caveats:
        parts.append("<h2>Caveats of this set</h2><ul>")
        parts += [f"<li>{html.escape(caveat)}</li>" for caveat in caveats]
        parts.append("</ul>")
    parts += _figures(run_set)
    parts.append("<h2>Every run</h2>" + _table(_every_run(run_set)))
    parts.append("<h2>What each number is</h2>" + _table(definitions(), "text"))
    parts.append("<h2>What the numbers do not show</h2><ul>")
    parts += [f"<li>{html.escape(limit)}</li>" for limit in _LIMITS]
    parts.append(
        "</ul><h2>Plan</h2>" + _pairs({k: v for k, v in record.plan.items() if k != "order"})
    )
    parts.append("<h2>Host</h2>" + _pairs(record.host))
    parts.append("<h2>Builds</h2>" + _pairs(record.binaries | {"lab": record.lab}))
    parts.append(f"<p class=note>Recorded {html.escape(record.created_utc)}.</p></body></html>")
    return "\n".join(parts)


def _figures(run_set: RunSet) -> list[str]:
    wanted: dict[str, tuple[str, Callable[[RunSet], Axes | list[Axes]]]] = {
        "cost": ("What a snapshot costs", figures.cost_figure),
        "slowdown": ("The guest around the snapshot", figures.slowdown_figure),
        "faults": ("Write faults", figures.faults_figure),
        "phases": ("The pause", figures.phases_figure),
    }
    have = figures.available(run_set)
    parts = []
    with plots.styled():
        for name, (title, draw) in wanted.items():
            if have[name]:
                parts.append(f"<h2>{title}</h2>" + _png(draw(run_set)))
    figures.close_all()
    return parts
