"""The flags of the command line, from the fields of the parts of a scenario, and back."""

import argparse
import dataclasses
import typing
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lab.scenario.dimensions import column_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_T = TypeVar("_T", bound="DataclassInstance")


def _flag(f: "dataclasses.Field[Any]") -> str:
    name: str = f.metadata.get("flag", f.metadata.get("dimension", f.name))
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse._ActionsContainer, cls: "type[DataclassInstance]") -> None:
    """Add one flag to `parser` for each field of `cls`, which is a part of a scenario.

    A flag that is not given leaves nothing in the namespace, so that what it changes need not be
    the default.
    """
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        hint, text = hints[f.name], f.metadata.get("help", "")
        with_default = f"{text} (default {f.default})"
        form: dict[str, Any]
        if hint is int:
            form = {"type": int, "metavar": "N", "help": with_default}
        elif typing.get_origin(hint) is Literal:
            form = {"choices": typing.get_args(hint), "help": with_default}
        elif hint in (bool, bool | None):
            form = {"action": argparse.BooleanOptionalAction, "help": text}
        elif hint is str:
            form = {"metavar": "TEXT", "help": text}
        elif hint == tuple[str, ...]:
            form = {"action": "append", "metavar": "ARG", "help": text}
        else:
            raise TypeError(f"no command line form for {cls.__name__}.{f.name}: {hint}")
        parser.add_argument(_flag(f), dest=column_of(f), default=argparse.SUPPRESS, **form)


def from_arguments(cls: type[_T], namespace: argparse.Namespace, base: _T | None = None) -> _T:
    """Build a `cls` from the flags that `add_arguments` added.

    :param base: what has the values of flags that were not given; by default those of the fields.
    """
    given = {}
    for f in dataclasses.fields(cls):
        if hasattr(namespace, column_of(f)):
            value = getattr(namespace, column_of(f))
            given[f.name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(cls() if base is None else base, **given)


def to_arguments(part: "DataclassInstance") -> list[str]:
    """The flags from which `from_arguments` builds `part`; what is the default is left out."""
    arguments = []
    for f in dataclasses.fields(part):
        value = getattr(part, f.name)
        if value == f.default:
            continue
        if isinstance(value, bool):
            arguments.append(_flag(f) if value else f"--no-{_flag(f)[2:]}")
        else:
            # With `=`, because a value may begin with a dash.
            values = value if isinstance(value, tuple) else (value,)
            arguments += [f"{_flag(f)}={one}" for one in values]
    return arguments
