"""The engine's phases become rows, in the order in which they began."""

from lab.instruments.phases import counters, df_phases

REPLY = {
    "status": "completed",
    "snapshot": {
        "engine": "rfc",
        "faults": 23,
        "pages-copied": 0,
        "start-ns": 90,
        "phases": [
            {"phase": "sweep", "start-ns": 300, "end-ns": 900},
            {"phase": "stop", "start-ns": 100, "end-ns": 150},
        ],
    },
}


def test_phases_are_ordered_by_their_start() -> None:
    df = df_phases(REPLY)
    assert df["phase"].tolist() == ["stop", "sweep"]
    assert df["duration_ns"].tolist() == [50, 600]


def test_a_qemu_that_says_nothing_gives_an_empty_table_of_the_same_types() -> None:
    empty, full = df_phases({"status": "completed"}), df_phases(REPLY)
    assert empty.empty
    assert empty.dtypes.equals(full.dtypes)


def test_counters_are_the_numbers_that_are_no_times() -> None:
    assert counters(REPLY) == {"faults": 23, "pages_copied": 0}
    assert counters({}) == {}
