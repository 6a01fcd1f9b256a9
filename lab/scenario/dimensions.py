"""Everything in which scenarios differ, as records: names, units, order of values."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lab.errors import UsageError
from lab.scenario.instruments import Instruments
from lab.scenario.machine import Machine
from lab.scenario.methods import METHODS, method
from lab.scenario.require import require, require_choice
from lab.scenario.scenario import Scenario
from lab.scenario.storage import Storage
from lab.scenario.workload import Workload

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


Zero = Literal["unlimited", "automatic", "none"]
"""What the 0 of a parameter stands for, where it is not a number."""


def column_of(f: "dataclasses.Field[Any]") -> str:
    return str(f.metadata.get("dimension", f.name))


def dimensions(value: "DataclassInstance") -> dict[str, Any]:
    """Return the parameters of `value` as one flat dictionary of table columns.

    What is of a user's own machine alone is left out: it is not varied.

    A scenario gives the parameters of all its parts, `method`, `engine` and `variant` together.
    """
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(value):
        if not f.metadata.get("varies", True):
            continue
        item = getattr(value, f.name)
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            flat |= dimensions(item)
        else:
            flat[column_of(f)] = item
    if isinstance(value, Scenario):
        flat |= {"engine": method(value.method).engine, "variant": value.variant}
    return flat


def parse_dimension(name: str, text: str) -> Any:
    """Return the value that `text` means for the parameter of a part of a scenario called `name`,
    with dashes or underscores, as a flag of the command line would have it.

    :raise UsageError: there is no such parameter, or `text` is no value of its type.
    """
    cls, f = _parameter(name)
    hint = typing.get_type_hints(cls)[f.name]
    if typing.get_origin(hint) is Literal:
        require_choice(column_of(f), text, hint)
        return text
    if hint in (bool, bool | None):
        names = {"yes": True, "no": False} | ({} if hint is bool else {"default": None})
        require(text in names, f"{name} is {text!r}", f"choose from: {', '.join(names)}")
        return names[text]
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{name} is {text!r}", "give a whole number") from None


# The parts of a scenario that have parameters, and what its JSON calls them.
_PARTS: Mapping[type[Any], str] = {
    Machine: "machine",
    Workload: "workload",
    Storage: "storage",
    Instruments: "instruments",
}


def replace_dimensions(
    machine: Machine,
    workload: Workload,
    storage: Storage,
    instruments: Instruments,
    changes: Mapping[str, Any],
) -> tuple[Machine, Workload, Storage, Instruments]:
    """Return all with the parameters in `changes` replaced, which are named as in tables.

    :raise UsageError: there is no such parameter, or a value that cannot work.
    """
    of: dict[type[Any], dict[str, Any]] = {cls: {} for cls in _PARTS}
    for name, value in changes.items():
        cls, f = _parameter(name)
        of[cls][f.name] = value
    return (
        dataclasses.replace(machine, **of[Machine]),
        dataclasses.replace(workload, **of[Workload]),
        dataclasses.replace(storage, **of[Storage]),
        dataclasses.replace(instruments, **of[Instruments]),
    )


_PARAMETERS: "Mapping[str, tuple[type[Any], dataclasses.Field[Any]]]" = {
    column_of(f): (cls, f)
    for cls in _PARTS
    for f in dataclasses.fields(cls)
    if f.name != "extra_args" and f.metadata.get("varies", True)
}


def _parameter(name: str) -> "tuple[type[Any], dataclasses.Field[Any]]":
    found = _PARAMETERS.get(name.replace("-", "_"))
    if found is None:
        known = ", ".join(_PARAMETERS)
        raise UsageError(f"there is no parameter {name!r}", f"choose from: {known}")
    return found


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """Something in which runs differ: the method, the host, or a parameter of their scenarios.

    `unit` is empty for what is no number.  `title` names it on an axis.  `order` is the order of
    its values in tables and figures; where it is empty they are numbers and go up.  `zero` is what
    0 stands for, where it is not a number of the unit: `unlimited` comes after every number,
    `automatic` and `none` before.
    """

    name: str
    unit: str = ""
    doc: str
    title: str
    order: tuple[Any, ...] = ()
    zero: Zero | None = None

    @property
    def heading(self) -> str:
        """Its title with its unit."""
        return self.title if self.unit in ("", "1") else f"{self.title}, {self.unit}"

    def is_number(self, value: object) -> bool:
        """Whether a value has a place among numbers: a line may lead from it to the next."""
        return not self.order and not (self.zero and value == 0)

    def place(self, value: Any) -> tuple[int, Any]:
        """A key that sorts its values; those that the lab does not know any more come last."""
        if self.order:
            known = value in self.order
            return (0, self.order.index(value)) if known else (1, str(value))
        if not isinstance(value, int | float):
            return (3, str(value))
        if self.is_number(value):
            return (1, value)
        return (2 if self.zero == "unlimited" else 0, 0)

    def shown(self, value: object) -> str:
        """A value for people."""
        return self.zero if self.zero and value == 0 else value_text(value)


def _dimension(name: str) -> Dimension:
    cls, f = _parameter(name)
    hint = typing.get_type_hints(cls)[f.name]
    orders = {bool: (False, True), bool | None: (None, False, True)}
    order = typing.get_args(hint) if typing.get_origin(hint) is Literal else orders.get(hint, ())
    return Dimension(
        name=name,
        unit=f.metadata.get("unit", ""),
        doc=f.metadata.get("doc", f.metadata["help"]),
        title=f.metadata.get("title", name.replace("_", " ")),
        order=order,
        zero=f.metadata.get("zero"),
    )


DIMENSIONS: Mapping[str, Dimension] = types.MappingProxyType(
    {
        "method": Dimension(
            name="method", doc="how the snapshot was taken", title="method", order=tuple(METHODS)
        ),
        "host": Dimension(name="host", doc="CPUs and kernel of the host", title="host"),
    }
    | {name: _dimension(name) for name in _PARAMETERS}
)
"""Everything in which runs can differ, by name: the method, the host and each parameter."""


def recorded_dimension(scenario: Mapping[str, Any], name: str) -> Any:
    """Return the parameter called `name` of a scenario's JSON; when it is not there, what it was.

    A recording of an older version of the lab does not name what did not exist then.
    """
    cls, f = _parameter(name)
    return scenario.get(_PARTS[cls], {}).get(f.name, f.metadata.get("earlier", f.default))


def case_name(method: str, values: Mapping[str, Any]) -> str:
    """Return what a table calls a method measured with these values of what is varied."""
    return ", ".join([method, *(f"{name}={value_text(value)}" for name, value in values.items())])


def value_text(value: Any) -> str:
    """A value as `parse_dimension` reads it."""
    names = {True: "yes", False: "no", None: "default"}
    return names[value] if value is None or isinstance(value, bool) else str(value)
