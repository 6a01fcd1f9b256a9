"""Records of columns and metrics: what the recorded numbers are called and mean."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

DType = Literal["int64", "uint64", "int32", "float64", "text", "category", "bool"]
"""What a column holds.  `text` and `category` are strings; a category repeats a few of them.  Every
kind may be null."""


@dataclass(frozen=True)
class Column:
    """Name, kind, unit and meaning of one column; the unit is empty for what is no number."""

    name: str
    dtype: DType
    unit: str
    doc: str


@dataclass(frozen=True)
class Metric(Column):
    """A number of the summary line.

    `title` names it for people with the unit that it is shown in, which is `unit` times `scale`.
    A `short` one is in the table that one sees first; all of them are in the report.
    """

    title: str = field(kw_only=True)
    scale: float = field(default=1.0, kw_only=True)
    short: bool = field(default=False, kw_only=True)

    def shown(self, value: float | None) -> str:
        """A value in the unit of the title, three significant digits; `-` for null."""
        return three_digits(None if value is None else value * self.scale)


def three_digits(value: float | None) -> str:
    """A number with three significant digits; `-` for null."""
    if value is None or math.isnan(value):
        return "-"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"
