"""One HTML file about a run set that can be mailed: no scripts, no links to anything outside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab import figures, plots
from lab.floor.summary import df_floor_readable, skipped
from lab.run import RunSet
from lab.summary import definitions, df_methods, df_readable, shown, warnings_of
from lab.tables import COLUMNS, METRICS, df_runs

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

_FLOOR_LIMITS = (
    "A sample is one round, and each step of it is timed in a process of its own: what repeats "
    "within one process shares its memory and its moment.",
    "Threads whose place matters are tied to one CPU each. A scheduler that is free to choose "
    "mixes these cases.",
    "Faults come one at a time, with at least 50 us between them: the handler never has a queue.",
    "Of a fault, `until the writer goes on` is negative where the writer ran on before the call "
    "that released the page had returned to the handler.",
    "Releasing is from the start of the memory onwards: of one huge page after the other only the "
    "first call in each splits it.",
    "What is written goes to the page cache where it is not `direct`; `sync` is what the medium "
    "still took. Memory was taken from the host before, so that it is not the host's memory "
    "management that is timed.",
    "Figures are of one host. Nested virtualisation makes inter-processor interrupts, and with "
    "them releasing a page while another thread runs, several times dearer than on bare metal.",
)


# Figures of what another figure is of, too.
_NEEDED = {"stages": "faults", "all-phases": "phases"}


def _png(axes: Axes | list[Axes]) -> str:
    figure = (axes[0] if isinstance(axes, list) else axes).get_figure()
    assert isinstance(figure, Figure)
    buffer = io.BytesIO()
    # Without the software's name in it the same data give the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return _embedded(buffer.getvalue())


def _embedded(png: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


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
    if run_set.kind == "floor":
        return _floor_report(run_set)
    title = html.escape(f"Live snapshots: {run_set.name}")
    parts = [*_head(title, plots.stamp_text(run_set)), *_note(run_set, "boots")]
    parts.append("<h2>Summary</h2>")
    parts.append(_table(df_readable(df_methods(run_set))))
    parts.append(
        "<p class=note>Median over boots [order-statistic interval of the median, at most 95 "
        "%; with fewer than six "
        "boots it is lowest to highest and covers less: 94 % at five, 75 % at three].</p>"
    )
    caveats = warnings_of(run_set)
    if caveats:
        parts += _list("Caveats of this set", caveats)
    parts += _figures(run_set)
    parts.append("<h2>Every run</h2>" + _table(_every_run(run_set)))
    parts.append("<h2>What each number is</h2>" + _table(definitions(), "text"))
    parts += _list("What the numbers do not show", _LIMITS)
    return "\n".join(parts + _tail(run_set))


def render_beside(pairs: Sequence[tuple[Path, Path]]) -> str:
    """One HTML document that shows figures beside each other, those of the recorded data to the
    left and those of this machine to the right.

    :param pairs: PNG files; one that does not exist is said to be missing.
    """
    parts = _head("Recorded and here", "left: recorded data; right: measured here")
    parts.append("<table><tr><th>recorded</th><th>here</th></tr>")
    for recorded, here in pairs:
        cells = "".join(
            f"<td>{_embedded(path.read_bytes()) if path.exists() else 'no such figure'}</td>"
            for path in (recorded, here)
        )
        name = html.escape(here.stem)
        parts.append(f"<tr><td colspan=2><b>{name}</b></td></tr><tr>{cells}</tr>")
    return "\n".join([*parts, "</table></body></html>"])


def _floor_report(run_set: RunSet) -> str:
    """The report on a set that `lab measure floor` recorded: table, figures, definitions, host."""
    title = html.escape(f"The floor: {run_set.name}")
    parts = [*_head(title, figures.floor_stamp_text(run_set)), *_note(run_set, "rounds")]
    parts.append(
        "<p>What this host's kernel asks for each step of a live snapshot, with no VM.</p>"
        "<h2>Summary</h2>"
    )
    parts.append(_table(df_floor_readable(run_set)))
    parts.append(
        "<p class=note>Median over rounds [order-statistic interval of the median, at most 95 "
        "%; with fewer than six rounds it is lowest to highest and covers less].</p>"
    )
    if caveats := skipped(run_set):
        parts += _list("Caveats of this set", caveats)
    with plots.styled():
        parts += [_png(axes) for axes in figures.floor_figures(run_set)]
    figures.close_all()
    columns = [(name, column.unit, column.doc) for name, column in COLUMNS["floor"].items()]
    stored = pd.DataFrame(columns, columns=["column", "unit", "meaning"])
    parts.append("<h2>What is stored</h2>" + _table(stored, "text"))
    parts += _list("What the numbers do not show", _FLOOR_LIMITS)
    return "\n".join(parts + _tail(run_set))


def _head(title: str, stamp: str) -> list[str]:
    return [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        f"<title>{title}</title><style>{_CSS}</style></head><body><h1>{title}</h1>",
        f"<p class=note>{html.escape(stamp)}</p>",
    ]


def _note(run_set: RunSet, samples: str) -> list[str]:
    parts = []
    if run_set.record.note:
        parts.append(f"<p>{html.escape(run_set.record.note)}</p>")
    if not run_set.complete:
        text = f"This set is unfinished: methods may have different numbers of {samples}."
        parts.append(f"<p><b>{text}</b></p>")
    return parts


def _list(title: str, items: Sequence[str]) -> list[str]:
    return [
        f"<h2>{title}</h2><ul>",
        *(f"<li>{html.escape(item)}</li>" for item in items),
        "</ul>",
    ]


def _tail(run_set: RunSet) -> list[str]:
    record = run_set.record
    return [
        "<h2>Plan</h2>" + _pairs({k: v for k, v in record.plan.items() if k != "order"}),
        "<h2>Host</h2>" + _pairs(record.host),
        "<h2>Builds</h2>" + _pairs(record.binaries | {"lab": record.lab}),
        f"<p class=note>Recorded {html.escape(record.created_utc)}.</p></body></html>",
    ]


def _figures(run_set: RunSet) -> list[str]:
    wanted: dict[str, tuple[str, Callable[[RunSet], Axes | list[Axes]]]] = {
        "cost": ("What a snapshot costs", figures.cost_figure),
        "slowdown": ("The guest around the snapshot", figures.slowdown_figure),
        "faults": ("Write faults", figures.faults_figure),
        "stages": ("What becomes of a write fault", figures.stages_figure),
        "stalls": ("What the guest's own operations took", figures.stalls_figure),
        "phases": ("The pause", figures.phases_figure),
        "all-phases": (
            "Every phase, the guest running in most of them",
            figures.phase_times_figure,
        ),
    }
    have = figures.available(run_set)
    parts = []
    with plots.styled():
        for name, (title, draw) in wanted.items():
            if have[_NEEDED.get(name, name)]:
                parts.append(f"<h2>{title}</h2>" + _png(draw(run_set)))
    figures.close_all()
    return parts
