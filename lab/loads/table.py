"""The table of requests: one row for each request that a load generator was to make."""

from __future__ import annotations

import pandas as pd

from lab.column import Column
from lab.units import Ns

TABLE = (
    Column(
        "due_ns",
        "int64",
        "ns",
        "CLOCK_MONOTONIC of the host: open loop: when the rate asked for the request; closed loop: "
        "when the connection's reply before it had come; pgbench: when the transaction began",
    ),
    Column("sent_ns", "int64", "ns", "when its first byte was sent; NA when it was not sent yet"),
    Column("done_ns", "int64", "ns", "when its whole reply had been read; NA when it had not yet"),
    Column(
        "latency_ns",
        "int64",
        "ns",
        "done less due, so that waiting for a free connection counts; of a censored request how "
        "long it had lasted when the table was read",
    ),
    Column("client", "int32", "", "index of the connection; NA when the request was not sent yet"),
    Column("operation", "category", "", "what was asked for"),
    Column(
        "number",
        "int64",
        "",
        "what a sequence wrote, counting up by 1 for each connection; 0 without a sequence",
    ),
    Column("ok", "bool", "", "whether the server did it; false when it answered with an error"),
    Column(
        "censored",
        "bool",
        "",
        "whether the request was not answered yet when the table was read: it lasted "
        "longer than `latency_ns`, and `ok` is false",
    ),
)
COLUMNS = tuple(column.name for column in TABLE)

_DTYPES = {
    "due_ns": "int64",
    "sent_ns": "Int64",
    "done_ns": "Int64",
    "latency_ns": "int64",
    "client": "Int32",
    "operation": "category",
    "number": "int64",
    "ok": "bool",
    "censored": "bool",
}
_ORDER = ["due_ns", "sent_ns", "client", "number"]


def request_table(
    *,
    due_ns: Ns,
    sent_ns: Ns,
    done_ns: Ns,
    client: Ns,
    operation: pd.Categorical[str],
    number: Ns,
    ok: Ns,
    until_ns: int,
) -> pd.DataFrame:
    """Make the table, in the order in which requests were due; 0 is for no instant.

    :param until_ns: the instant up to which what happened is in the arrays; it is in the table's
        `attrs` under this name.
    """
    table = pd.DataFrame(
        {
            "due_ns": due_ns,
            "sent_ns": pd.array(sent_ns, dtype="Int64"),
            "done_ns": pd.array(done_ns, dtype="Int64"),
            "latency_ns": pd.Series(done_ns).where(done_ns != 0, until_ns).to_numpy() - due_ns,
            "client": pd.array(client, dtype="Int32"),
            "operation": operation,
            "number": number,
            "ok": ok.astype(bool),
            "censored": done_ns == 0,
        }
    )
    table.loc[sent_ns == 0, ["sent_ns", "client"]] = pd.NA
    table.loc[done_ns == 0, "done_ns"] = pd.NA
    return in_order(table, until_ns)


def in_order(table: pd.DataFrame, until_ns: int) -> pd.DataFrame:
    """`table` with its columns, types and rows in the one order that they have everywhere."""
    ordered = table[list(COLUMNS)].astype(_DTYPES)
    ordered = ordered.sort_values(_ORDER, kind="stable", ignore_index=True)
    ordered.attrs = {"until_ns": until_ns}
    return ordered
