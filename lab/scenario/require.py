"""Refuse parameters that cannot work, with the cause and the remedy."""

import typing

from lab.errors import UsageError


def require(condition: bool, cause: str, remedy: str) -> None:
    """Raise `UsageError` unless the condition holds."""
    if not condition:
        raise UsageError(cause, remedy)


def require_choice(name: str, value: str, choices: object) -> None:
    """Raise `UsageError` unless the value is one of a `Literal`."""
    allowed = typing.get_args(choices)
    require(value in allowed, f"unknown {name} {value!r}", f"choose from: {', '.join(allowed)}")


def require_int(name: str, value: object, low: int, high: int) -> None:
    """Raise `UsageError` unless the value is a whole number from `low` to `high`."""
    # bool is an int, and True would pass for 1.
    good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    require(good, f"{name} is {value!r}", f"give a whole number from {low} to {high}")


def require_bool(name: str, value: object) -> None:
    """Raise `UsageError` unless the value is True or False."""
    require(isinstance(value, bool), f"{name} is {value!r}", "give True or False")


def require_strings(name: str, value: object) -> None:
    """Raise `UsageError` unless the value is a tuple of strings."""
    good = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    require(good, f"{name} is {value!r}", "give a tuple of strings")


def require_string(name: str, value: object) -> None:
    """Raise `UsageError` unless the value is a string."""
    require(isinstance(value, str), f"{name} is {value!r}", "give a string")
