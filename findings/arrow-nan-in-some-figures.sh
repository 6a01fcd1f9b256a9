#!/bin/sh
# One NaN in a column: pyarrow's mean is NaN, its median and maximum leave NaN out, unsaid.
#
# One would guess: all figures of one column treat NaN alike: either each becomes NaN, as in
#   NumPy, or each leaves it out, as in pandas.
# What is so: mean, sum and variance become NaN; max, quantile and t-digest leave it out; count
#   and the number of rows contain it.  In pandas the answer then depends on how the same Parquet
#   file was read: with Arrow's types the mean is NaN, and isna() sees nothing missing.
# Seen with: pyarrow 26.0.1, pandas 3.1.1, Python 3.11.
# Output seen: pyarrow: count 4, mean nan, median 3.0, max 100.0
#              pandas: mean 34.666666666666664, missing 1
#              pandas with Arrow's types: mean nan, missing 0
# Why it matters: a median of fewer samples than the count beside it says.  Write what was not
#   measured as null, which all of them leave out: pyarrow.array(values, from_pandas=True).
#
# Needs: Python 3.11 or later with venv, and the network for pip.

set -eu
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q pyarrow==26.0.1 pandas==3.1.1 2> "$work/pip" \
    || { cat "$work/pip" >&2; exit 1; }

"$work/venv/bin/python" - "$work/column.parquet" << 'END'
import sys

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

NAN = float("nan")


def figures(column):
    return [
        f"count {pc.count(column)}, mean {pc.mean(column)}",
        f"median {pc.quantile(column, 0.5)[0]}, max {pc.max(column)}",
    ]


def by_pandas(table, **how):
    series = table.to_pandas(**how)["wait_us"]
    return f"mean {series.mean()}, missing {int(series.isna().sum())}"


print("pyarrow", pa.__version__, "pandas", pd.__version__)
pq.write_table(pa.table({"wait_us": [1.0, NAN, 3.0, 100.0]}), sys.argv[1])
table = pq.read_table(sys.argv[1])
seen = [
    "pyarrow: " + ", ".join(figures(table["wait_us"])),
    "pandas: " + by_pandas(table),
    "pandas with Arrow's types: " + by_pandas(table, types_mapper=pd.ArrowDtype),
]
print("\n".join(seen))
assert figures(pa.array([1.0, NAN, 3.0, 100.0], from_pandas=True))[0].startswith("count 3, mean 34")
sys.exit(
    seen
    != [
        "pyarrow: count 4, mean nan, median 3.0, max 100.0",
        "pandas: mean 34.666666666666664, missing 1",
        "pandas with Arrow's types: mean nan, missing 0",
    ]
)
END
