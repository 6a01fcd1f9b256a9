"""A plan as a command line, and back."""

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lab.errors import UsageError
from lab.scenario.applications import ApplicationsPlan
from lab.scenario.dimensions import parse_dimension, value_text
from lab.scenario.flags import add_arguments, from_arguments, to_arguments
from lab.scenario.floor import FloorPlan
from lab.scenario.instruments import Instruments
from lab.scenario.machine import Machine
from lab.scenario.methods import METHODS
from lab.scenario.storage import Storage
from lab.scenario.workload import Workload

if TYPE_CHECKING:
    from lab.scenario.plan import Plan

# Numbers of a plan, and their flags: `--seed` is the workload's.
_NUMBERS = {"repeats": "repeats", "warmups": "warmups", "seed": "order-seed"}


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `plan_from_arguments` reads, in groups."""
    group = parser.add_argument_group("plan")

    def add(flag: str, meaning: str, **form: Any) -> None:
        group.add_argument(flag, default=argparse.SUPPRESS, help=meaning, **form)

    add(
        "--method",
        f"repeatable; one of {', '.join(METHODS)} (default: every method)",
        action="append",
        dest="methods",
        metavar="METHOD",
    )
    add(
        "--vary",
        "measure each of these values of a parameter below, as in ram-mib=512,1024 or "
        "workload=idle,random; yes, no or default for a switch; repeatable for every combination",
        action="append",
        metavar="PARAMETER=VALUE,...",
    )
    add("--repeats", "boots per case (default 5)", type=int, metavar="N")
    add("--warmups", "rounds before them that do not count (default 0)", type=int, metavar="N")
    order = "seed of the order of cases within each round (default 1)"
    add("--order-seed", order, type=int, metavar="N")
    add(
        "--verify",
        "after each timed snapshot take another, restore it and compare every byte of RAM",
        action="store_true",
    )
    for part in (Machine, Workload, Storage, Instruments):
        add_arguments(parser.add_argument_group(part.__name__.lower()), part)


def plan_from_arguments(args: argparse.Namespace, base: "Plan") -> "Plan":
    """The plan that flags make of `base`, which keeps what no flag is given for.

    :raise UsageError: the plan cannot be measured.
    """
    given = vars(args)
    return dataclasses.replace(
        base,
        methods=tuple(dict.fromkeys(given.get("methods", base.methods))),
        machine=from_arguments(Machine, args, base.machine),
        workload=from_arguments(Workload, args, base.workload),
        storage=from_arguments(Storage, args, base.storage),
        instruments=from_arguments(Instruments, args, base.instruments),
        repeats=given.get("repeats", base.repeats),
        warmups=given.get("warmups", base.warmups),
        seed=given.get("order_seed", base.seed),
        verify=given.get("verify", base.verify),
        vary=base.vary | _varied(given.get("vary", [])),
    )


def _varied(given: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    varied: dict[str, tuple[Any, ...]] = {}
    for text in given:
        name, equals, values = text.partition("=")
        name = name.replace("-", "_")
        if not equals or not values:
            raise UsageError(f"--vary {text}", "give it as PARAMETER=VALUE,VALUE")
        if name in varied:
            raise UsageError(f"--vary names {name} twice", "give all its values at once")
        varied[name] = tuple(parse_dimension(name, value) for value in values.split(","))
    return varied


def command(plan: "Plan | FloorPlan | ApplicationsPlan") -> str:
    """The command line that measures a plan: `lab measure`, `lab floor` or `lab applications`.

    Parameters that have their default value are left out.  Parsed, it gives an equal plan.
    """
    if isinstance(plan, FloorPlan):
        return shlex.join(["lab", "floor", *to_arguments(plan)])
    if isinstance(plan, ApplicationsPlan):
        return shlex.join(["lab", "applications", *to_arguments(plan)])
    arguments = [f"--method={name}" for name in plan.methods]
    for name, values in sorted(plan.vary.items()):
        arguments.append(f"--vary={name.replace('_', '-')}={','.join(map(value_text, values))}")
    for f in dataclasses.fields(plan):
        if f.name in _NUMBERS and (value := getattr(plan, f.name)) != f.default:
            arguments.append(f"--{_NUMBERS[f.name]}={value}")
    arguments += ["--verify"] if plan.verify else []
    for part in (plan.machine, plan.workload, plan.storage, plan.instruments):
        arguments += to_arguments(part)
    return shlex.join(["lab", "measure", *arguments])
