"""What a reader must know to judge a figure: boots, machine, host, builds, date."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.figures.style import in_order
from lab.runs.run import Run, held_back_text
from lab.runs.sets import RunSet
from lab.scenario.dimensions import DIMENSIONS, recorded_dimension
from lab.scenario.guests import GUEST_LIMITS
from lab.scenario.machine import Machine

_CHARACTERS_PER_INCH = 20
"""Of the text under a figure, about."""


def stamp_text(run_set: RunSet, *, drawn: Sequence[Run] | None = None) -> str:
    """What a set was measured with and on, in parts with ` | ` between them.

    :param drawn: the runs that the figure shows; by default all that count.
    """
    if run_set.kind == "floor":
        return " | ".join(_of_floor(run_set))
    if run_set.kind == "applications":
        return " | ".join(_of_applications(run_set, drawn))
    runs = run_set.measured()
    if drawn is not None:
        cases = {run.case for run in drawn}
        runs = [run for run in runs if run.case in cases]
    if not runs:
        return f"{run_set.name}: no run that counts"

    def boots_of(some: Sequence[Run]) -> str:
        counts = sorted(set(Counter(r.case for r in some).values()))
        return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"

    shown, boots = boots_of(runs if drawn is None else drawn), boots_of(runs)
    if shown != boots:
        boots = f"{shown} of {boots}"

    def all_of(field: str) -> str:
        found = {r.summary.get(field) for r in runs}
        return "/".join(map(str, in_order(field, list(found))))

    def limit(field: str, unit: str) -> list[str]:
        found = {recorded_dimension(r.record.scenario, field) for r in runs}
        texts = map(DIMENSIONS[field].shown, in_order(field, list(found)))
        return [f"{'/'.join(texts)} {unit}"] if any(found) else []

    def workload(run: Run) -> str:
        # An idle guest has no working set.
        mib = run.summary.get("wss_mib")
        return f"{run.summary.get('workload')}" + ("" if mib is None else f" {mib} MiB")

    guests = {recorded_dimension(r.record.scenario, "guest") for r in runs}
    # The ordinary one is not named.
    other = [GUEST_LIMITS[name].title for name in sorted(guests - {Machine.guest})]
    machine = " ".join([all_of("accel"), *other])
    builds = sorted({r.build for r in runs})
    host = run_set.record.host
    parts = [
        f"n={boots} boot{'' if boots == '1' else 's'} per {'case' if run_set.varied else 'method'}",
        f"{machine}, {all_of('vcpus')} vCPU, {all_of('ram_mib')} MiB RAM",
        ", ".join(sorted({workload(run) for run in runs})),
        *limit("rate_ops_per_s", "operations/s"),
        *(f"image at {text}" for text in limit("storage_mib_per_s", "MiB/s")),
        str(host.get("cpu_model") or host.get("cpu") or "unknown CPU"),
        f"Linux {host.get('kernel') or host.get('kernel_release') or 'unknown'}",
        "QEMU " + ", ".join(builds),
        *held_back_text(runs),
        _origin(run_set),
    ]
    return " | ".join(parts)


def _of_floor(run_set: RunSet) -> list[str]:
    host = run_set.record.host
    return [
        f"n={len(run_set.measured())} rounds",
        f"{host.get('cpu_count', '?')} CPUs, {host.get('cpu_model', 'unknown')}",
        f"Linux {host.get('kernel', 'unknown')}",
        f"files on {host.get('image_filesystem', 'unknown')}",
        *held_back_text(run_set.measured(), "rounds"),
        _origin(run_set),
    ]


def _of_applications(run_set: RunSet, drawn: Sequence[Run] | None) -> list[str]:
    plan, host, runs = run_set.record.plan, run_set.record.host, run_set.measured()
    counts = sorted(set(Counter(run.record.method for run in runs).values()))
    rounds = " to ".join(map(str, dict.fromkeys((*counts[:1], *counts[-1:])))) or "no"
    if drawn is not None and len(drawn) < len(runs):
        rounds = f"1 of {rounds}"
    connections = {run.record.scenario.get("clients") or None for run in runs} - {None}
    return [
        f"n={rounds} rounds",
        str(plan.get("application")),
        *(f"{count} connections" for count in sorted(map(str, connections))),
        f"tcg, {plan.get('vcpus')} vCPUs, {plan.get('ram_mib')} MiB RAM",
        f"{host.get('cpu_count', '?')} CPUs, {host.get('cpu_model', 'unknown')}",
        f"Linux {host.get('kernel', 'unknown')}",
        "QEMU " + ", ".join(sorted({run.build for run in runs})),
        *held_back_text(runs, "samples"),
        _origin(run_set),
    ]


def _origin(run_set: RunSet) -> str:
    return f"set {run_set.name}, {run_set.record.created_utc[:10]}"


def write_under(ax: Axes, *, stamp: str, caption: str = "") -> None:
    """Write small under the figure of `ax`, as wide as that is, and make it higher for it."""
    figure = ax.get_figure()
    if not isinstance(figure, Figure):
        return
    width, height = figure.get_size_inches()
    limit = round(width * _CHARACTERS_PER_INCH)
    lines = [*textwrap.wrap(caption, limit), *_wrapped(stamp, limit)]
    figure.set_size_inches(width, height + 0.1 * len(lines))
    figure.supxlabel("\n".join(lines), fontsize=6.5, color="#555555", x=0.01, ha="left")


def _wrapped(stamp: str, limit: int) -> list[str]:
    """The stamp in lines, none of its parts broken where that can be."""
    lines: list[str] = []
    for part in stamp.split(" | "):
        if lines and len(lines[-1]) + len(part) + 3 <= limit:
            lines[-1] += f" | {part}"
        else:
            lines.append(part)
    return lines
