"""The flags of the command line, from the fields of the parts of a scenario."""

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
    """Add one flag to `parser` for each field of `cls`, which is a part of a scenario."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        hint, help_text = hints[f.name], f.metadata.get("help", "")
        common: dict[str, Any] = {"dest": column_of(f), "default": f.default}
        if hint is int:
            parser.add_argument(
                _flag(f), type=int, metavar="N", help=f"{help_text} (default {f.default})", **common
            )
        elif typing.get_origin(hint) is Literal:
            choices = typing.get_args(hint)
            parser.add_argument(
                _flag(f), choices=choices, help=f"{help_text} (default {f.default})", **common
            )
        elif hint in (bool, bool | None):
            parser.add_argument(
                _flag(f), action=argparse.BooleanOptionalAction, help=help_text, **common
            )
        elif hint == tuple[str, ...]:
            parser.add_argument(
                _flag(f), action="append", metavar="ARG", help=help_text, **common | {"default": []}
            )
        else:
            raise TypeError(f"no command line form for {cls.__name__}.{f.name}: {hint}")


def from_arguments(cls: type[_T], namespace: argparse.Namespace) -> _T:
    """Build a `cls` from the flags that `add_arguments` added."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        value = getattr(namespace, column_of(f))
        values[f.name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)
