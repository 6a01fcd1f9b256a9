"""Every notebook measures here and now where it is asked to, with guests that are small."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab.errors import HostError
from lab.guests.debian.build import find_debian
from lab.measure.campaign import open_set, plan_here, plan_of
from lab.measure.ground import survey
from lab.report import notebooks
from lab.runs.sets import RunSet, load_set
from lab.scenario.plan import Plan
from lab.vm.accelerator import accelerator_problem
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.vm,
    pytest.mark.notebook,
    pytest.mark.thorough,
    pytest.mark.platforms("tcg"),
    # How long it takes is the host's business: one that is busy takes ten times as long.
    pytest.mark.timeout(3600),
]

PATHS = notebooks.notebook_paths(ROOT / "notebooks")
RAM_MIB = 192
WSS_MIB = 32
KNOWN_FAULTS = (7, 13)  # as many as 32 MiB hold in pages apart
METHODS = ("live", "background", "migrate-to-file")
TIMEOUT_S = 3600.0


def smaller(plan: Plan) -> Plan:
    """A plan that asks the same of small guests: of each parameter two values, of sizes small
    ones; where several parameters are varied together, of the others one.
    """
    vary: dict[str, Any] = {}
    for place, (name, values) in enumerate(sorted(plan.vary.items())):
        small = {"ram_mib": (RAM_MIB, 2 * RAM_MIB), "known_faults": KNOWN_FAULTS}
        values = small.get(name, values)
        vary[name] = tuple(values[: 2 if place == 0 or name == "workload" else 1])
    return replace(
        plan,
        methods=tuple(name for name in plan.methods if name in METHODS),
        machine=replace(plan.machine, ram_mib=RAM_MIB),
        workload=replace(plan.workload, wss_mib=WSS_MIB),
        vary=vary,
    )


async def skip_without_accelerator(recorded: RunSet) -> None:
    if problem := await accelerator_problem(plan_here(plan_of(recorded)).machine):
        pytest.skip(f"{recorded.name}: {problem}")


def skip_without_debian() -> None:
    try:
        find_debian()
    except HostError as error:
        pytest.skip(str(error))


def small_set(recorded: RunSet, folder: Path) -> RunSet:
    """A set of nothing but a plan, which is all that measuring again asks for."""
    plan = smaller(plan_here(plan_of(recorded)))
    return open_set(folder / recorded.name, plan, survey(plan))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
async def test_it_runs_live(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    parameters: dict[str, Any] = {"LIVE": True}
    for parameter, name in notebooks.sets_named(path).items():
        recorded = load_set(ROOT / "data" / name)
        if recorded.kind == "snapshot":
            await skip_without_accelerator(recorded)
        if recorded.kind == "applications":
            skip_without_debian()
        shown = small_set(recorded, tmp_path) if recorded.kind == "snapshot" else recorded
        parameters[parameter] = str(shown.path)
    target = tmp_path / "live.ipynb"
    await notebooks.execute(path, target, parameters, timeout_s=TIMEOUT_S)
    assert len(notebooks.save_figures(target, tmp_path / "figures")) >= 3
    # What it shows was measured by it, and its guests and images are gone.
    measured = [load_set(found.parent) for found in tmp_path.glob("*/*/set.json")]
    assert all(one.complete and all(taken.ok for taken in one) for one in measured)
    assert not list(tmp_path.glob("**/*.snap"))
