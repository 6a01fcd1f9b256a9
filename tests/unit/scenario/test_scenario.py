"""One definition of every parameter gives flags, JSON and table columns."""

import argparse
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.errors import UsageError
from lab.scenario.dimensions import (
    DIMENSIONS,
    dimensions,
    parse_dimension,
    recorded_dimension,
    replace_dimensions,
)
from lab.scenario.document import from_json, to_json
from lab.scenario.engines import DEFAULT_CHUNK_KIB
from lab.scenario.flags import add_arguments, from_arguments
from lab.scenario.instruments import Instruments
from lab.scenario.machine import BOOLEAN_DEVICES, Machine
from lab.scenario.methods import METHODS, method
from lab.scenario.scenario import Scenario
from lab.scenario.storage import Storage
from lab.scenario.workload import Workload
from tests.support.strategies import instruments, machines, storages, workloads

known_faults = st.builds(Instruments, known_faults=st.integers(1, 4096))
scenarios = st.builds(
    lambda machine, workload, name, storage, instruments: Scenario(
        machine=machine
        if METHODS[name].runs_on("patched")
        else dataclasses.replace(machine, fault_around_pages=0, chunk_kib=DEFAULT_CHUNK_KIB),
        workload=workload,
        method=name,
        storage=storage if METHODS[name].is_stream else Storage(),
        instruments=instruments,
    ),
    machines,
    workloads,
    st.sampled_from(sorted(METHODS)),
    storages,
    instruments,
)


def _untyped(arguments: dict[str, Any]) -> dict[str, Any]:
    """Let a test pass what a type checker would refuse."""
    return arguments


@given(scenarios)
def test_a_scenario_survives_json(scenario: Scenario) -> None:
    assert from_json(Scenario, json.loads(json.dumps(to_json(scenario)))) == scenario


@given(machines, workloads, storages, instruments | known_faults)
def test_flags_default_to_the_fields_and_set_every_field(
    machine: Machine, workload: Workload, storage: Storage, instruments: Instruments
) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser, Machine)
    add_arguments(parser, Workload)
    add_arguments(parser, Storage)
    add_arguments(parser, Instruments)
    assert from_arguments(Machine, parser.parse_args([])) == Machine()
    assert from_arguments(Workload, parser.parse_args([])) == Workload()
    assert from_arguments(Storage, parser.parse_args([])) == Storage()
    assert from_arguments(Instruments, parser.parse_args([])) == Instruments()
    argv = [f"--ram-mib={machine.ram_mib}", f"--vcpus={machine.vcpus}", f"--accel={machine.accel}"]
    argv += [f"--ram-kind={machine.ram_kind}", *(f"--extra-arg={a}" for a in machine.extra_args)]
    argv += {None: [], True: ["--thp"], False: ["--no-thp"]}[machine.thp]
    argv += [f"--disk={machine.disk}", f"--disk-cache={machine.disk_cache}"]
    argv += [f"--disk-aio={machine.disk_aio}", f"--chunk-kib={machine.chunk_kib}"]
    argv += [f"--fault-around-pages={machine.fault_around_pages}"]
    argv.append(f"--chipset={machine.chipset}")
    for name in BOOLEAN_DEVICES:
        flag = name.replace("_", "-")
        argv.append(f"--{flag}" if getattr(machine, name) else f"--no-{flag}")
    argv += [f"--workload={workload.kind}", f"--wss-mib={workload.wss_mib}"]
    argv += [f"--threads={workload.threads}", f"--seed={workload.seed}"]
    argv.append(f"--rate-ops-per-s={workload.rate_ops_per_s}")
    argv.append(f"--storage-mib-per-s={storage.storage_mib_per_s}")
    for name, value in to_json(instruments).items():
        flag = name.replace("_", "-")
        without = {True: f"--{flag}", False: f"--no-{flag}"}
        argv.append(without[value] if isinstance(value, bool) else f"--{flag}={value}")
    namespace = parser.parse_args(argv)
    assert from_arguments(Machine, namespace) == machine
    assert from_arguments(Workload, namespace) == workload
    assert from_arguments(Storage, namespace) == storage
    assert from_arguments(Instruments, namespace) == instruments


def test_dimensions_name_every_parameter_once() -> None:
    columns = dimensions(Scenario(method="live-rfc"))
    parameters = [f.name for f in dataclasses.fields(Machine) if f.metadata.get("varies", True)]
    parameters += [f.name for f in dataclasses.fields(Workload)]
    parameters += [f.name for f in dataclasses.fields(Storage)]
    parameters += [f.name for f in dataclasses.fields(Instruments)]
    assert set(columns) == {
        *(name for name in parameters if name != "kind"),
        *("workload", "method", "engine", "variant"),
    }
    assert columns["workload"] == "random"
    assert columns["engine"] == "rfc"


@given(scenarios)
def test_replacing_every_dimension_of_one_scenario_by_anothers_gives_the_other(
    scenario: Scenario,
) -> None:
    other = dimensions(scenario)
    changes = {k: other[k] for k in set(other) - {"method", "engine", "variant", "extra_args"}}
    machine, workload, storage, instruments = replace_dimensions(
        Machine(), Workload(), Storage(), Instruments(), changes
    )
    assert machine == dataclasses.replace(scenario.machine, extra_args=())
    assert workload == scenario.workload
    assert storage == scenario.storage
    assert instruments == scenario.instruments


def test_a_recording_that_names_no_instrument_had_the_fault_log_and_nothing_else() -> None:
    for recorded in ({"method": "live"}, {"method": "live", "instruments": {}}):
        found = from_json(Scenario, recorded).instruments
        assert [name for name, on in to_json(found).items() if on is True] == ["log_faults"]
        for name, value in to_json(found).items():
            assert recorded_dimension(recorded, name) == value
    assert from_json(Scenario, {"instruments": {"time_threads": True}}).instruments.time_threads
    # What is asked for now is everything that watches; to rebuild is to do something.
    left_out = [name for name, on in to_json(Scenario().instruments).items() if on is False]
    assert left_out == ["rebuild_huge_pages"]


def test_a_recording_that_names_no_storage_was_made_at_the_speed_of_the_disk() -> None:
    assert from_json(Scenario, {"method": "live"}).storage == Storage(storage_mib_per_s=0)
    assert recorded_dimension({"method": "live"}, "storage_mib_per_s") == 0


@pytest.mark.parametrize("name", METHODS)
def test_what_needs_a_file_is_refused_where_only_a_stream_can_be_written(name: str) -> None:
    storage = Storage(storage_mib_per_s=100)
    if METHODS[name].is_stream:
        assert dimensions(Scenario(method=name, storage=storage))["storage_mib_per_s"] == 100
    else:
        with pytest.raises(UsageError, match=f"{name} writes here and there.*choose from: live,"):
            Scenario(method=name, storage=storage)
    assert METHODS[name].is_stream == (name.rpartition("-")[2] not in ("mapped", "direct"))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("storage-mib-per-s", "100", 100),
        ("ram-mib", "512", 512),
        ("workload", "idle", "idle"),
        ("thp", "default", None),
        ("thp", "no", False),
        ("net", "yes", True),
    ],
)
def test_a_dimension_is_read_from_text_by_its_type(name: str, text: str, value: object) -> None:
    assert parse_dimension(name, text) == value
    if name == "net":
        with pytest.raises(UsageError, match="yes, no"):
            parse_dimension(name, "default")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ({"ram_mib": "1024"}, "ram_mib"),
        ({"ram_mib": 1}, "ram_mib is 1"),
        ({"colour": "red"}, "colour"),
        ({"disk": "ide", "disk_aio": "native"}, "disk_aio native does not work"),
        ([], "machine"),
    ],
)
def test_json_that_is_no_machine_is_refused_in_one_line(data: object, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        from_json(Machine, data)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_file_leaves_out_is_written_out_again() -> None:
    assert to_json(from_json(Machine, {"ram_mib": 512})) == to_json(Machine(ram_mib=512))


def test_an_unknown_key_deep_inside_is_refused() -> None:
    data = to_json(Scenario())
    data["machine"]["colour"] = "red"
    with pytest.raises(UsageError, match=r"colour at \$\.machine"):
        from_json(Scenario, data)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Machine(vcpus=0),
        lambda: Machine(vcpus=True),
        lambda: Machine(**_untyped({"accel": "xen"})),
        lambda: Machine(**_untyped({"ram_kind": "silk"})),
        lambda: Machine(ram_kind="hugetlb", ram_mib=257),
        lambda: Machine(ram_kind="hugetlb", thp=True),
        lambda: Machine(**_untyped({"extra_args": ["-S"]})),
        lambda: Machine(**_untyped({"disk": "floppy"})),
        lambda: Machine(**_untyped({"net": 1})),
        lambda: Machine(disk_cache="none"),
        lambda: Machine(disk_iothread=True),
        lambda: Machine(disk="virtio", disk_aio="native"),
        lambda: Machine(disk="ide", disk_iothread=True),
        lambda: Machine(disk="ide", chipset="q35"),
        lambda: Machine(chipset="isapc"),  # type: ignore[arg-type]  # wrong on purpose
        lambda: Machine(balloon_reporting=True),
        lambda: Machine(chunk_kib=300),
        lambda: Machine(chunk_kib=128),
        lambda: Machine(fault_around_pages=3),
        lambda: Machine(fault_around_pages=128, chunk_kib=256),
        lambda: Scenario(machine=Machine(chunk_kib=256), method="background"),
        lambda: parse_dimension("colour", "red"),
        lambda: parse_dimension("extra_args", "-S"),
        lambda: parse_dimension("ram-mib", "much"),
        lambda: parse_dimension("workload", "chess"),
        lambda: parse_dimension("net", "maybe"),
        lambda: replace_dimensions(
            Machine(), Workload(), Storage(), Instruments(), {"colour": "red"}
        ),
        lambda: Storage(storage_mib_per_s=-1),
        lambda: Storage(**_untyped({"storage_mib_per_s": True})),
        lambda: parse_dimension("storage-mib-per-s", "fast"),
        lambda: Instruments(**_untyped({"time_threads": 1})),
        lambda: Instruments(sample_interval_us=50),
        lambda: Instruments(known_faults=-1),
        lambda: Instruments(known_faults=7, log_faults=False),
        lambda: Scenario(instruments=Instruments(known_faults=7)),
        lambda: Scenario(
            method="background",
            workload=Workload("idle"),
            instruments=Instruments(known_faults=7),
        ),
        lambda: Workload(**_untyped({"kind": "busy"})),
        lambda: Workload(threads=0),
        lambda: Workload(rate_ops_per_s=-1),
        lambda: Workload("idle", rate_ops_per_s=1),
        lambda: Scenario(method="magic"),
        lambda: Scenario(machine=Machine(ram_mib=256), workload=Workload(wss_mib=256)),
        lambda: method("magic"),
    ],
)
def test_values_that_can_not_work_are_usage_errors_with_a_remedy(build: object) -> None:
    assert callable(build)
    with pytest.raises(UsageError) as caught:
        build()
    assert caught.value.remedy


def test_methods_say_which_binary_can_do_them() -> None:
    assert METHODS["live-rfc"].runs_on("patched")
    assert not METHODS["live-rfc"].runs_on("unpatched")
    assert not METHODS["background"].runs_on("patched")
    assert METHODS["stop-and-copy"].runs_on("patched")
    assert METHODS["stop-and-copy"].runs_on("unpatched")


def test_the_method_and_every_parameter_are_dimensions_that_put_their_values_in_order() -> None:
    parts = (Machine(), Workload(), Storage(), Instruments())
    defaults = {name: value for part in parts for name, value in dimensions(part).items()}
    del defaults["extra_args"]
    assert set(DIMENSIONS) == {"method", "host", *defaults}
    for name, value in defaults.items():
        one = DIMENSIONS[name]
        assert one.title
        assert one.doc
        assert one.shown(value)
        if one.order:
            assert value in one.order
        else:
            # A number has a unit, except a seed, which measures nothing.
            assert one.unit or name == "seed"
            assert value == 0 or not one.zero


def test_a_zero_that_is_no_number_has_a_word_and_a_place_of_its_own() -> None:
    rate, around, faults = (
        DIMENSIONS[name] for name in ("rate_ops_per_s", "fault_around_pages", "known_faults")
    )
    assert [one.shown(0) for one in (rate, around, faults)] == ["unlimited", "automatic", "none"]
    assert [one.shown(16) for one in (rate, around, faults)] == ["16"] * 3
    assert sorted([16, 0, 4], key=rate.place) == [4, 16, 0]
    assert sorted([16, 0, 4], key=around.place) == [0, 4, 16]
    assert not rate.is_number(0)
    assert DIMENSIONS["chunk_kib"].is_number(2048)


def test_values_that_the_lab_does_not_know_any_more_come_last() -> None:
    known = ["stop-and-copy", "live-of-old", "live"]
    assert sorted(known, key=DIMENSIONS["method"].place) == ["live", "stop-and-copy", "live-of-old"]
    thp = DIMENSIONS["thp"]
    assert sorted([True, None, False], key=thp.place) == [None, False, True]
    assert [thp.shown(value) for value in (None, False, True)] == ["default", "no", "yes"]
