"""One HTML file about a run set that can be mailed: no scripts, no links to anything outside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.analysis.floor import df_floor_readable, skipped
from lab.analysis.instruments import (
    df_overhead,
    df_overhead_readable,
    recorded_overhead,
    sampling_cost,
    varied_instruments,
)
from lab.analysis.stages import STAGES
from lab.analysis.warnings import warnings_of
from lab.figures import figures, plots
from lab.host.room import require_room
from lab.measure.settle import TAIL_LIMIT_S
from lab.runs.cases import df_runs
from lab.runs.columns import COLUMNS, METRICS, definitions
from lab.runs.methods import df_methods, df_readable
from lab.runs.sets import RunSet
from lab.scenario.dimensions import recorded_dimension

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
    "longer: the fault's way to the handler and the wake-up of the vCPU come on top. Of the "
    "highest latencies some are too high: the vCPU may take the CPU before the time is noted.",
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

# What they do not show where a parameter is not what it mostly is.
_LIMITS_OF = {
    "rate_ops_per_s": "The guest was to do so many operations a second and no more, and it makes "
    "up for delays of up to 10 ms: what those cost it is not in the lost work.",
    "storage_mib_per_s": "The image was written at a limited rate. Of a slow disk that shows the "
    "rate alone, not how long a request takes, nor what others want of the disk; what is still on "
    "its way when the duration ends is at most 2 ms of it.",
}

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
    for name, metric in METRICS.items():
        table[name] = [metric.shown(value) for value in frame[name]]
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
    parts += _method_of_measuring(run_set)
    parts += _figures(run_set)
    parts += _instruments(run_set)
    parts.append("<h2>Every run</h2>" + _table(_every_run(run_set)))
    parts.append("<h2>What each number is</h2>" + _table(definitions(), "text"))
    parts += _list("What the numbers do not show", _limits(run_set))
    return "\n".join(parts + _tail(run_set))


def write_report(path: Path, page: str) -> None:
    """Write a page into a file.

    :raise HostError: when the disk has no room for it.
    """
    content = page.encode()
    if path.is_file() or not path.exists():
        require_room(path.parent, len(content), "a report", "free some disk space")
    path.write_bytes(content)


def _limits(run_set: RunSet) -> list[str]:
    scenarios = [run.record.scenario for run in run_set]
    special = [
        text
        for name, text in _LIMITS_OF.items()
        if any(recorded_dimension(scenario, name) for scenario in scenarios)
    ]
    return [*_LIMITS, *special]


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
    """The report on a set that `lab floor` recorded: table, figures, definitions, host."""
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


@dataclass(frozen=True, kw_only=True)
class _Figure:
    """A figure of the report: `needs` is what `figures.available` has to say of it."""

    title: str
    needs: str
    draw: Callable[[RunSet], Axes | list[Axes]]
    caption: str


_FIGURES = (
    _Figure(
        title="What a snapshot costs",
        needs="cost",
        draw=figures.cost_figure,
        caption="A point is one boot, the bar their median. The definitions are below.",
    ),
    _Figure(
        title="The guest around the snapshot",
        needs="slowdown",
        draw=figures.slowdown_figure,
        caption="One boot per method, the one of median duration: operations that the guest "
        f"completed in each bin of {figures.SLOWDOWN_BIN_MS:g} ms, by a counter in its memory that "
        "is read from outside, against the second before the request. It does not show single slow "
        "operations, nor how boots differ.",
    ),
    _Figure(
        title="Write faults",
        needs="faults",
        draw=figures.faults_figure,
        caption="Share of the write faults that were served within a time, a line a boot, from "
        "the log of the patched QEMU: reading the kernel's message until the return of the call "
        "that releases the page. The way of a fault to the handler and back is not in it.",
    ),
    _Figure(
        title="What becomes of a write fault",
        needs="faults",
        draw=figures.stages_figure,
        caption="The same faults by stage, as far as the engine has it: "
        + "; ".join(f"{stage}: {meaning}" for stage, meaning in STAGES.items())
        + ". Faults on pages that another thread had saved are left out.",
    ),
    _Figure(
        title="What the guest's own operations took",
        needs="stalls",
        draw=figures.stalls_figure,
        caption="By the guest's own clock, which stops with the VM: no pause is in it. Every "
        "operation longer than 4 us between request and completion, whatever held it up; the "
        "thin grey lines are the second before.",
    ),
    _Figure(
        title="What the guest waits for a page",
        needs="waits",
        draw=figures.waits_figure,
        caption="Each write fault of the log beside the guest's own operation on that page, by the "
        "guest's clock: between the two curves of a case is the way to the handler and back. "
        "Operations are matched by page and time; a fault for which the guest noted none is left "
        "out. Where the handler's part is the longer one, the guest went on before the call that "
        "released the page had returned.",
    ),
    _Figure(
        title="The pause",
        needs="phases",
        draw=figures.phases_figure,
        caption="The phases in which no vCPU runs, by the engine's clock, a bar a boot. QEMU's "
        "handling of the events around them is not in it.",
    ),
    _Figure(
        title="Every phase, the guest running in most of them",
        needs="phases",
        draw=figures.phase_times_figure,
        caption="A point is one boot, the bar their median; by the engine's clock.",
    ),
)


def _figures(run_set: RunSet) -> list[str]:
    have = figures.available(run_set)
    parts = []
    with plots.styled():
        for figure in _FIGURES:
            if have[figure.needs]:
                parts.append(f"<h2>{figure.title}</h2>" + _png(figure.draw(run_set)))
                parts.append(f"<p class=note>{html.escape(figure.caption)}</p>")
    figures.close_all()
    return parts


def _method_of_measuring(run_set: RunSet) -> list[str]:
    """How often and in which order, for a reader who has nothing but this page."""
    plan = run_set.record.plan
    items = [
        "Each run is a boot of its own. A round holds every "
        + ("case" if run_set.varied else "method")
        + f" once, in an order drawn anew (seed {plan.get('seed')}), so that what changes on the "
        f"host reaches all alike. {len(run_set.measured())} runs count, of "
        f"{plan.get('repeats')} rounds"
        + (f" after {plan['warmups']} that do not" if plan.get("warmups") else "")
        + ".",
        "The guest runs its workload until its rate is even, then a second for the baseline, then "
        "the snapshot is requested; progress is recorded until the old rate is back, for "
        f"{TAIL_LIMIT_S:g} s at most.",
        "All times are the host's CLOCK_MONOTONIC but those of the guest's own operations.",
    ]
    return _list("How it was measured", items)


def _instruments(run_set: RunSet) -> list[str]:
    """What measuring itself costs: from the set, where it was varied, and else from the recorded
    set that did so.
    """
    parts = ["<h2>What the instruments cost</h2>"]
    source: RunSet | None = run_set if varied_instruments(run_set) else recorded_overhead()
    if source is None:
        parts.append(
            "<p>Not measured in this set, and the lab's recorded set is not at hand: measure with "
            "<code>lab measure --vary log-faults=yes,no</code>.</p>"
        )
    else:
        where = "In this set" if source is run_set else "Measured in another set, not in this one"
        parts.append(f"<p>{where}: {html.escape(plots.stamp_text(source))}.</p>")
        parts.append(_table(df_overhead_readable(df_overhead(source))))
        parts.append(
            "<p class=note>Medians over boots without and with each instrument, whatever else was "
            "on; ratio of medians [interval, 95 %], p of the permutation test. Noise is half the "
            "distance of the quartiles of the boots without it, as a share of their median. "
            "Samples are not left out but taken as seldom as in any boot of the set.</p>"
        )
    sampling = sampling_cost(run_set)
    if len(sampling):
        parts.append("<p>Reading the guest's progress, in this set:</p>")
        sampling["read_us"] = [f"{value:.1f}" for value in sampling["read_us"]]
        sampling["share"] = [f"{value:.2f}" for value in sampling["share"]]
        names = {"read_us": "one read, us", "share": "of one CPU, %"}
        parts.append(_table(sampling.rename(columns=names)))
    return parts
