"""How objects show themselves in a notebook: one compact table."""

import html
from collections.abc import Mapping


def html_row(cells: Mapping[str, str]) -> str:
    """An HTML table of one row under its headings; everything is escaped."""
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in cells)
    values = "".join(f"<td>{html.escape(value)}</td>" for value in cells.values())
    return f"<table><tr>{heads}</tr><tr>{values}</tr></table>"
