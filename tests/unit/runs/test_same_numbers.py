"""What figures and tables are drawn from is, for the recorded sets, what it was when they were
recorded: however the lab is rebuilt, it computes the same numbers.

`tests/unit/data/derived-tables.json` has a digest for each table of each set.  A test that
fails here names the set and the table; where a definition was changed on purpose, write
the digests anew with `python -m tests.unit.runs.test_same_numbers`, and say so where the number
is defined.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping

import pandas as pd
import pytest
from pandas.api.types import is_numeric_dtype

from lab.analysis import instruments as overhead
from lab.analysis import stages as anatomy
from lab.analysis.faults import df_faults_by_method
from lab.analysis.phases import df_phases_by_method
from lab.analysis.waits import df_waits_by_method, df_write_latency_by_method
from lab.runs.cases import df_runs
from lab.runs.methods import df_methods
from lab.runs.sets import RunSet, load_set
from lab.scenario.dimensions import DIMENSIONS
from tests.support.paths import DATA, TEST_DATA

RECORD = TEST_DATA / "derived-tables.json"
DIGESTS: Mapping[str, Mapping[str, str]] = json.loads(RECORD.read_text(encoding="utf-8"))

DERIVED: Mapping[str, Callable[[RunSet], pd.DataFrame]] = {
    "runs": df_runs,
    "faults": lambda one: df_faults_by_method(one.measured()),
    "phases": lambda one: df_phases_by_method(one.measured()),
    "write_latency": lambda one: df_write_latency_by_method(one.measured()),
    "waits": lambda one: df_waits_by_method(one.measured()),
    "stages": lambda one: anatomy.df_fault_stages(one.measured()),
    "against": lambda one: anatomy.df_against_floor(one, load_set(DATA / "floor")),
    "methods": df_methods,
    "sampling": overhead.sampling_cost,
    "gaps": overhead.df_sample_gaps,
}


def digest(table: pd.DataFrame) -> str:
    """A digest of what is measured in a table: not of its cases, nor of the order of its rows."""
    lines = []
    for name in sorted(str(column) for column in table.columns):
        values = table[name].dropna()
        if name not in DIMENSIONS and is_numeric_dtype(values) and len(values):
            values = values.astype(float)
            found = (math.fsum(values), values.min(), values.median(), values.max())
            lines.append(f"{name} {len(values)} " + " ".join(f"{value:.9g}" for value in found))
    return hashlib.sha256("\n".join([str(len(table)), *lines]).encode()).hexdigest()[:16]


def digests(name: str) -> dict[str, str]:
    """The digests of every table of a recorded set."""
    recorded = load_set(DATA / name, verify=False)
    return {table: digest(derive(recorded)) for table, derive in DERIVED.items()}


@pytest.mark.parametrize("name", DIGESTS)
def test_the_tables_of_a_recorded_set_have_the_numbers_that_they_had(name: str) -> None:
    assert digests(name) == DIGESTS[name]


def test_a_number_that_changes_in_its_seventh_digit_is_seen() -> None:
    table = pd.DataFrame({"run": ["a", "b"], "pause_ms": [2.0, 3.0]})
    assert digest(table) == digest(table.iloc[::-1])
    assert digest(table) != digest(table.assign(pause_ms=[2.0, 3.000001]))
    assert digest(table) != digest(table.iloc[:1])


if __name__ == "__main__":
    new = {name: digests(name) for name in DIGESTS}
    RECORD.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")
