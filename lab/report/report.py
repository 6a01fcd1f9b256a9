"""One HTML file about a run set that can be mailed: no scripts, no links to anything outside.

What it says is put together here; how it looks is in the templates beside this module, which
escape whatever people typed.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.analysis.applications import (
    applications_notes,
    df_application_ratios_readable,
    df_applications_readable,
)
from lab.analysis.floor import df_floor_readable, skipped
from lab.analysis.instruments import (
    df_overhead,
    df_overhead_readable,
    recorded_overhead,
    sampling_cost,
    varied_instruments,
)
from lab.analysis.warnings import warnings_of
from lab.figures.applications import (
    plot_application_throughput,
    plot_request_latency,
    plot_requests,
    plot_worst_request,
)
from lab.figures.cost import plot_cost
from lab.figures.faults import plot_fault_latency, plot_fault_stages
from lab.figures.figure import Plot, Text
from lab.figures.floor import plot_floor_bulk, plot_floor_faults
from lab.figures.phases import plot_phase_times, plot_phases
from lab.figures.speed import plot_slowdown
from lab.figures.stamp import stamp_text
from lab.figures.style import styled
from lab.figures.waits import plot_stalls, plot_waits
from lab.host.room import require_room
from lab.measure.settle import TAIL_LIMIT_S
from lab.runs.cases import df_runs
from lab.runs.columns import APPLICATION_FIELDS, COLUMNS, METRICS, definitions
from lab.runs.methods import df_methods, df_readable
from lab.runs.sets import RunSet
from lab.scenario.dimensions import recorded_dimension

FIGURES: Sequence[Plot[..., Any]] = (
    plot_cost,
    plot_slowdown,
    plot_fault_latency,
    plot_fault_stages,
    plot_stalls,
    plot_waits,
    plot_phases,
    plot_phase_times,
)
"""The figures of a report, as far as a set has what they need."""

FLOOR_FIGURES: Sequence[Plot[..., Any]] = (plot_floor_faults, plot_floor_bulk)
"""The figures of a report on the floor."""

APPLICATION_FIGURES: Sequence[Plot[..., Any]] = (
    plot_application_throughput,
    plot_requests,
    plot_request_latency,
    plot_worst_request,
)
"""The figures of a report on an application."""

_APPLICATION_LIMITS = (
    "A sample is a round. Methods of a round share a boot, its memory and its disk's layers; their "
    "order is drawn anew in each.",
    "Requests go through QEMU's user network, whose main loop forwards them one after the other: a "
    "real network card is faster, and the main loop that it spares has more time for a snapshot.",
    "The load runs on the host that runs the guest, and takes CPU time from both.",
    "Latencies end with the reply. What a method still writes afterwards, or has left in the page "
    "cache, is not in them beyond half a second.",
)

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
    "Faults come one at a time, with at least 50 µs between them: the handler never has a queue.",
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


@dataclass(frozen=True)
class _Drawn:
    """A figure of the report: what it says, and its PNG in base64."""

    text: Text
    png: str


def _figures(run_set: RunSet, plots: Sequence[Plot[..., Any]]) -> list[_Drawn]:
    drawn = []
    with styled():
        for plot in plots:
            if plot.missing(run_set) is None:
                drawn.append(_Drawn(plot.text, _png(plot.without_caption(run_set))))
    return drawn


def _png(axes: Axes | list[Axes]) -> str:
    figure = (axes[0] if isinstance(axes, list) else axes).get_figure()
    assert isinstance(figure, Figure)
    buffer = io.BytesIO()
    # Without the software's name in it the same data give the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    # A long-lived process would keep them all.
    plt.close(figure)
    return _base64(buffer.getvalue())


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _table(frame: pd.DataFrame, css: str = "") -> str:
    """A table as HTML, in which pandas has escaped what people typed."""
    return str(frame.to_html(index=False, border=0, na_rep="-", classes=css, escape=True))


def _page(template: str, **content: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["table"] = _table
    return environment.get_template(template).render(content)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            rows.append((prefix + key, ", ".join(map(str, value))))
        else:
            rows.append((prefix + key, "-" if value is None else str(value)))
    return rows


def _facts(run_set: RunSet) -> list[tuple[str, pd.DataFrame]]:
    """What was planned and what it ran on, in pairs."""
    record = run_set.record
    facts = {
        "Plan": {k: v for k, v in record.plan.items() if k != "order"},
        "Host": record.host,
        "Builds": record.binaries | {"lab": record.lab},
    }
    return [
        (name, pd.DataFrame(_flat(values), columns=["what", "value"]))
        for name, values in facts.items()
    ]


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
    kinds = {"floor": _about_floor, "applications": _about_applications}
    about = kinds.get(run_set.kind, _about_snapshots)(run_set)
    return _page(
        "report.html.j2",
        record=run_set.record,
        stamp=stamp_text(run_set),
        facts=_facts(run_set),
        **about,
    )


def _about_snapshots(run_set: RunSet) -> dict[str, Any]:
    return {
        "title": f"Live snapshots: {run_set.name}",
        "samples": "boots",
        "summary": df_readable(df_methods(run_set)),
        "caveats": warnings_of(run_set),
        "measured": _method_of_measuring(run_set),
        "figures": _figures(run_set, FIGURES),
        "runs": _every_run(run_set),
        "definitions": definitions(),
        "limits": _limits(run_set),
        **_instruments(run_set),
    }


def _about_floor(run_set: RunSet) -> dict[str, Any]:
    """The report on a set that `lab floor` recorded: table, figures, definitions, host."""
    columns = [(name, column.unit, column.doc) for name, column in COLUMNS["floor"].items()]
    return {
        "title": f"The floor: {run_set.name}",
        "samples": "rounds",
        "summary": df_floor_readable(run_set),
        "caveats": skipped(run_set),
        "measured": [],
        "figures": _figures(run_set, FLOOR_FIGURES),
        "definitions": pd.DataFrame(columns, columns=["column", "unit", "meaning"]),
        "limits": _FLOOR_LIMITS,
    }


def _about_applications(run_set: RunSet) -> dict[str, Any]:
    """The report on a set that `lab applications` recorded."""
    columns = [(name, column.unit, column.doc) for name, column in APPLICATION_FIELDS.items()]
    return {
        "title": f"What an application feels: {run_set.name}",
        "samples": "samples",
        "summary": df_applications_readable(run_set),
        "caveats": applications_notes(run_set),
        "measured": [
            "A round boots Debian once for each QEMU and takes every method once, in an order "
            f"drawn anew (seed {run_set.record.plan.get('seed')}), under a load that has run until "
            "its rate was even.",
            "The window is from the request until half a second after the end.",
            *_ratios(run_set),
        ],
        "figures": _figures(run_set, APPLICATION_FIGURES),
        "definitions": pd.DataFrame(columns, columns=["field", "unit", "meaning"]),
        "limits": _APPLICATION_LIMITS,
    }


def _ratios(run_set: RunSet) -> list[str]:
    """A line for each method that another is set against."""
    rows = df_application_ratios_readable(run_set).to_dict("records")
    return ["; ".join(f"{name}: {value}" for name, value in row.items()) for row in rows]


def write_report(path: Path, page: str) -> None:
    """Write a page into a file.

    :raise HostError: when the disk has no room for it.
    """
    content = page.encode()
    if path.is_file() or not path.exists():
        require_room(path.parent, len(content), "a report", "free some disk space")
    path.write_bytes(content)


def render_beside(pairs: Sequence[tuple[Path, Path]]) -> str:
    """One HTML document that shows figures beside each other, those of the recorded data to the
    left and those of this machine to the right.

    :param pairs: PNG files; one that does not exist is said to be missing.
    """
    figures = [
        (here.stem, *(_base64(path.read_bytes()) if path.exists() else "" for path in (old, here)))
        for old, here in pairs
    ]
    stamp = "left: recorded data; right: measured here"
    return _page("beside.html.j2", title="Recorded and here", stamp=stamp, figures=figures)


def _limits(run_set: RunSet) -> list[str]:
    scenarios = [run.record.scenario for run in run_set]
    special = [
        text
        for name, text in _LIMITS_OF.items()
        if any(recorded_dimension(scenario, name) for scenario in scenarios)
    ]
    return [*_LIMITS, *special]


def _method_of_measuring(run_set: RunSet) -> list[str]:
    """How often and in which order, for a reader who has nothing but this page."""
    plan = run_set.record.plan
    return [
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


def _instruments(run_set: RunSet) -> dict[str, Any]:
    """What measuring itself costs: from the set, where it was varied, and else from the recorded
    set that did so.
    """
    own = bool(varied_instruments(run_set))
    source: RunSet | None = run_set if own else recorded_overhead()
    where = "In this set" if own else "Measured in another set, not in this one"
    sampling = sampling_cost(run_set)
    sampling["read_us"] = [f"{value:.1f}" for value in sampling["read_us"]]
    sampling["share"] = [f"{value:.2f}" for value in sampling["share"]]
    names = {"read_us": "one read, µs", "share": "of one CPU, %"}
    return {
        "overhead": None if source is None else df_overhead_readable(df_overhead(source)),
        "overhead_source": "" if source is None else f"{where}: {stamp_text(source)}",
        "sampling": sampling.rename(columns=names) if len(sampling) else None,
    }
