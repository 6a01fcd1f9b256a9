"""Named campaigns: the question of each, and the plan that answers it, from campaigns.toml."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lab.errors import UsageError
from lab.scenario.applications import ApplicationsPlan
from lab.scenario.dimensions import replace_dimensions
from lab.scenario.document import from_json
from lab.scenario.floor import FloorPlan
from lab.scenario.instruments import Instruments
from lab.scenario.machine import Machine
from lab.scenario.plan import Plan
from lab.scenario.storage import Storage
from lab.scenario.workload import Workload

SOURCE = Path(__file__).with_name("campaigns.toml")


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """A plan that has a name; a `FloorPlan` is measured by `lab floor`, an `ApplicationsPlan` by
    `lab applications`.
    """

    name: str
    question: str
    plan: Plan | FloorPlan | ApplicationsPlan


@cache
def campaigns() -> Mapping[str, Campaign]:
    """Every named campaign, in the order of the file."""
    entries = tomllib.loads(SOURCE.read_text(encoding="utf-8"))
    return {name: _campaign(name, **entry) for name, entry in entries.items()}


def campaign(name: str) -> Campaign:
    """The campaign called `name`; raise `UsageError` when there is none."""
    found = campaigns().get(name)
    if found is None:
        raise UsageError(f"unknown campaign {name!r}", f"choose from: {', '.join(campaigns())}")
    return found


def _campaign(
    name: str,
    *,
    question: str,
    methods: list[str] | None = None,
    base: Mapping[str, Any] | None = None,
    vary: Mapping[str, list[Any]] | None = None,
    floor: Mapping[str, Any] | None = None,
    applications: Mapping[str, Any] | None = None,
    **others: Any,
) -> Campaign:
    plan: Plan | FloorPlan | ApplicationsPlan
    if floor is not None:
        plan = FloorPlan(**floor)
    elif applications is not None:
        plan = from_json(ApplicationsPlan, applications)
    else:
        machine, workload, storage, instruments = replace_dimensions(
            Machine(), Workload(), Storage(), from_json(Instruments, {}), base or {}
        )
        plan = Plan(
            methods=tuple(methods or ()),
            machine=machine,
            workload=workload,
            storage=storage,
            instruments=instruments,
            vary={parameter: tuple(values) for parameter, values in (vary or {}).items()},
            # repeats, warmups, seed, verify
            **others,
        )
    return Campaign(name=name, question=question, plan=plan)
