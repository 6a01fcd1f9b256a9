"""How objects show themselves in a notebook: one compact table."""

import html
from collections.abc import Mapping

import pandas as pd


def html_row(cells: Mapping[str, str]) -> str:
    """An HTML table of one row under its headings; everything is escaped."""
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in cells)
    values = "".join(f"<td>{html.escape(value)}</td>" for value in cells.values())
    return f"<table><tr>{heads}</tr><tr>{values}</tr></table>"


def text_table(table: pd.DataFrame) -> str:
    """A table of text as aligned lines, the first column to the left."""
    cells = [[str(name) for name in table.columns]]
    cells += [[str(value) for value in row] for row in table.itertuples(index=False)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(table.columns))]
    lines = []
    for row in cells:
        first, *rest = (
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines)
