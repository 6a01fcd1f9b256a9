#!/bin/sh
# The longest stall, and all that it stands for, is left out of an HdrHistogram without an error.
#
# One would guess: a value above the histogram's range is an error, or counts as the highest value;
#   and the correction for coordinated omission still adds those samples below it that are in range.
# What is so: record_corrected_value returns False and records nothing.  One stall in the range
#   makes the 99th percentile bad; a longer one leaves it as if there had been none.  The histogram
#   keeps no count of what it left out.
# Seen with: hdrhistogram 0.10.8, Python 3.11.
# Output seen: stall of 0 us: 1000 samples, p99 100 us, max 100 us
#              stall of 900000 us: 1900 samples, p99 881151 us, max 900095 us
#              stall of 3000000 us: 1000 samples, p99 100 us, max 100 us
# Why it matters: the worse the snapshot, the better the figure.  Raise an error when a record
#   call returns False, or count those and say so beside every percentile.
#
# Needs: Python 3.11 or later with pip, and the network for pip.

set -eu
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m pip install -q --target "$work/packages" hdrhistogram==0.10.8 2> "$work/pip" \
    || { cat "$work/pip" >&2; exit 1; }

PYTHONPATH="$work/packages" python3 - << 'END'
import importlib.metadata
import sys

from hdrh.histogram import HdrHistogram

RANGE_US = 1_000_000
INTERVAL_US = 1_000


def figures(stall_us):
    histogram = HdrHistogram(1, RANGE_US, 3)
    for _ in range(1_000):
        histogram.record_corrected_value(100, INTERVAL_US)
    if stall_us:
        histogram.record_corrected_value(stall_us, INTERVAL_US)
    count, p99_us = histogram.get_total_count(), histogram.get_value_at_percentile(99)
    return count, p99_us, histogram.get_max_value()


print("hdrhistogram", importlib.metadata.version("hdrhistogram"))
seen = {}
for stall_us in (0, 900_000, 3_000_000):
    seen[stall_us] = count, p99_us, max_us = figures(stall_us)
    print(f"stall of {stall_us} us: {count} samples, p99 {p99_us} us, max {max_us} us")
sys.exit(not (seen[3_000_000] == seen[0] and seen[900_000][1] > 800_000))
END
