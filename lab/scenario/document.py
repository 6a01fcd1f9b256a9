"""The parts of a scenario as JSON, and back."""

import dataclasses
import typing
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from lab.errors import UsageError
from lab.scenario.require import require

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_T = TypeVar("_T", bound="DataclassInstance")


def to_json(value: "DataclassInstance") -> dict[str, Any]:
    """Return `value` as what JSON can hold."""
    # Not `value` itself: of a field that `from_json` left at its default nothing would be written.
    result: dict[str, Any] = msgspec.to_builtins(dataclasses.asdict(value))
    return result


def from_json(cls: type[_T], data: object) -> _T:
    """Build a `cls` from parsed JSON.

    Types are not coerced, and a key that no field has is an error, so that a file of a newer
    version is never read in part.  What did not exist when it was written is as it was then.
    Raises `UsageError`.
    """
    _reject_unknown_keys(cls, data, "$")
    try:
        return msgspec.convert(_with_earlier(cls, data), cls)
    except msgspec.ValidationError as err:
        # A UsageError of __post_init__ arrives as the cause, already in one line.
        if isinstance(err.__cause__, UsageError):
            raise err.__cause__ from None
        raise UsageError(f"not a {cls.__name__.lower()}: {err}", "check the file") from err


def _with_earlier(cls: "type[DataclassInstance]", data: object) -> object:
    if not isinstance(data, dict):
        return data
    hints = typing.get_type_hints(cls)
    filled = dict(data)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            if part := _with_earlier(hints[f.name], data.get(f.name, {})):
                filled[f.name] = part
        elif "earlier" in f.metadata:
            filled.setdefault(f.name, f.metadata["earlier"])
    return filled


def _reject_unknown_keys(cls: "type[DataclassInstance]", data: object, where: str) -> None:
    if not isinstance(data, dict):
        return
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - {f.name for f in dataclasses.fields(cls)})
    require(
        not unknown,
        f"unknown {cls.__name__.lower()} parameter {', '.join(map(str, unknown))} at {where}",
        "use the version of the lab that wrote it",
    )
    for name, item in data.items():
        if dataclasses.is_dataclass(hints[name]):
            _reject_unknown_keys(hints[name], item, f"{where}.{name}")
