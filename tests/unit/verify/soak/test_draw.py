"""Whatever is drawn can be run, and the same seed gives the same trial."""

import dataclasses
import hashlib
import itertools
import json
import typing
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.errors import UsageError
from lab.scenario.document import from_json, to_json
from lab.scenario.guests import LAB_GUESTS
from lab.scenario.machine import RAM_RESERVE_MIB, Machine, RamKind
from lab.scenario.methods import METHODS
from lab.scenario.scenario import Scenario
from lab.scenario.workload import Workload, WorkloadKind
from lab.verify.soak.draw import (
    BUFFER_MIB,
    CHUNK_KIB,
    FAULT_AROUND_PAGES,
    GUESTS,
    LARGE_RAM_KINDS,
    LARGE_RAM_MIB,
    LATER_KINDS,
    MACHINE,
    MICRO,
    NEVER_DRAWN,
    SHOTS,
    SIMPLER,
    VERSION,
    WORKLOAD,
    Choice,
    GuestChoice,
    Offer,
    RunState,
    Trial,
    draw,
)

KINDS = typing.get_args(RamKind)
#: Fields that are not drawn: KVM is not everywhere, the guest is chosen, what `extra_args` may hold
#: is anything, a Linux guest that is not paced is the harder one, and what is of users' machines
#: alone is not of these.
NOT_DRAWN = {"accel", "guest", "extra_args", "rate_ops_per_s", "page_kib"} | {
    f.name for f in dataclasses.fields(Machine) if not f.metadata.get("varies", True)
}
#: Fields that go with the binary, and are drawn after it.
SIZES = {"fault_around_pages", "chunk_kib"}

#: Of what the first 200 seeds give.
DIGEST = "25e99c6bddc00197"

#: What is drawn for a trial as a whole.
WHOLE = ("keep", "ksm", "pressure")

seeds = st.integers(0, 2**63)
offers = st.builds(
    Offer,
    ram_kinds=st.frozensets(st.sampled_from(KINDS)).map(lambda kinds: kinds | {"anon", "memfd"}),
    thp_kinds=st.frozensets(st.sampled_from(["anon", "memfd", "file"])),
    direct_io=st.booleans(),
    disk_direct_io=st.booleans(),
    large_ram=st.booleans(),
    flash=st.booleans(),
    ksm=st.booleans(),
    pressure=st.booleans(),
    kvm_guests=st.frozensets(st.sampled_from(["linux", "micro"])),
)
choices = st.builds(
    lambda guest, **others: Choice(guest=guest[0], accel=guest[1], **others),
    methods=st.lists(st.sampled_from(sorted(METHODS)), min_size=1, unique=True).map(tuple),
    ram_kinds=st.lists(st.sampled_from(KINDS), min_size=1, unique=True).map(tuple),
    guest=st.tuples(st.sampled_from(typing.get_args(GuestChoice)), st.sampled_from(["tcg", "kvm"]))
    | st.just(("any", "auto")),
    states=st.lists(st.sampled_from(typing.get_args(RunState)), min_size=1).map(tuple),
)


def many(count: int = 400, offer: Offer | None = None) -> list[Trial]:
    return [draw(seed, offer=offer) for seed in range(count)]


@given(seeds, choices, offers)
def test_what_is_drawn_goes_together_and_is_offered(
    seed: int, choice: Choice, offer: Offer
) -> None:
    trial = draw(seed, choice, offer)
    machine, workload = trial.machine, trial.workload
    assert trial.seed == seed
    assert 1 <= len(trial.shots) <= max(SHOTS)
    assert choice.guest in (machine.guest, "any")
    assert choice.accel in (machine.accel, "auto")
    assert choice.accel != "auto" or machine.accel == "tcg" or machine.guest in offer.kvm_guests
    if machine.ram_mib == LARGE_RAM_MIB:
        assert offer.large_ram
        assert machine.guest == "linux"
        assert machine.ram_kind in LARGE_RAM_KINDS
    assert offer.flash or not machine.flash
    assert offer.ksm or not trial.ksm
    assert offer.pressure or not trial.pressure
    assert not trial.shots[0].restored
    for before, shot in itertools.pairwise(trial.shots):
        assert not (machine.guest == "micro" and before.reset and shot.restored)
    assert machine.ram_kind in offer.ram_kinds
    assert machine.ram_kind in {*choice.ram_kinds, "memfd"}
    if machine.thp:
        assert machine.ram_kind in offer.thp_kinds
        assert machine.ram_kind == "anon" or trial.variant == "patched"
    for shot in trial.shots:
        # Builds a Scenario, which refuses what does not fit.
        scenario = Scenario(machine=machine, workload=workload, method=shot.method)
        assert from_json(Scenario, json.loads(json.dumps(to_json(scenario)))) == scenario
        how = METHODS[shot.method]
        assert how.runs_on(trial.variant)
        assert how.name in choice.methods or how.name == "live-mapped"
        assert offer.direct_io or not how.direct_io
        assert shot.channels == 1 or "mapped-ram" in how.capabilities
        assert shot.balloon_mib == 0 or machine.balloon
        assert shot.state in choice.states or (shot.state, trial.variant) == (
            "running",
            "unpatched",
        )
        assert shot.state == "running" or not (shot.reset or shot.balloon_mib)
        assert shot.balloon_mib + workload.wss_mib + RAM_RESERVE_MIB["linux"] <= machine.ram_mib
    assert offer.disk_direct_io or machine.disk_cache == "writeback"


@given(seeds, offers)
def test_the_sizes_drawn_are_sizes_the_engine_takes(seed: int, offer: Offer) -> None:
    trial = draw(seed, offer=offer)
    around, chunk = trial.machine.fault_around_pages, trial.machine.chunk_kib << 10
    huge = 512 if trial.machine.ram_kind == "hugetlb" else 1
    for shot in trial.shots:
        needed = max(chunk, huge * 4096) + max(64, around, huge) * 4096
        assert shot.buffer_mib << 20 >= needed
        assert shot.buffer_mib >= min(BUFFER_MIB)
    if trial.variant == "unpatched":
        assert not trial.machine.sets_sizes
        # Upstream loses interrupts and lets resets into the image; the series repairs both.
        assert not trial.machine.disk_iothread
        assert not trial.machine.flash
        assert not any(shot.reset or shot.state == "prelaunch" for shot in trial.shots)


@given(seeds, choices, offers)
def test_the_same_seed_gives_the_same_trial(seed: int, choice: Choice, offer: Offer) -> None:
    assert draw(seed, choice, offer) == draw(seed, choice, offer)


@given(seeds, offers, st.lists(st.sampled_from(sorted(SIMPLER)), unique=True), st.data())
def test_what_is_simplified_is_simple_and_the_rest_goes_together(
    seed: int, offer: Offer, names: list[str], data: st.DataObject
) -> None:
    shots = len(draw(seed, offer=offer).shots)
    only = data.draw(st.integers(0, shots))
    trial = draw(seed, Choice(simplify=tuple(names), only_shot=only), offer)
    assert len(trial.shots) == (1 if only else shots)
    for name in names:
        for_machine, for_workload, for_shots = SIMPLER[name]
        for field, value in for_machine.items():
            assert getattr(trial.machine, field) == value, field
        for field, value in for_workload.items():
            # What only the microguest has is not drawn for this one.
            assert field in MICRO or getattr(trial.workload, field) == value, field
        for shot in trial.shots:
            for field, value in for_shots.items():
                assert getattr(shot, field) == value or field == "buffer_mib", field
    for shot in trial.shots:
        Scenario(machine=trial.machine, workload=trial.workload, method=shot.method)


def test_one_snapshot_of_a_guest_is_the_one_that_was_drawn() -> None:
    whole = next(trial for trial in many() if len(trial.shots) == 3)
    alone = draw(whole.seed, Choice(only_shot=2))
    # With none before there is no image to restore either.
    second = dataclasses.replace(whole.shots[1], restored=False)
    assert alone == dataclasses.replace(whole, shots=(second,))
    with pytest.raises(UsageError, match="gives 3 snapshots"):
        draw(whole.seed, Choice(only_shot=4))


def test_seeds_give_the_same_everywhere_and_for_ever() -> None:
    """What was recorded with a seed has to be what the seed gives later: where it no longer is,
    `lab.verify.soak.draw.VERSION` has to rise.
    """
    assert VERSION == 4
    trial = draw(1)
    assert trial.machine.ram_kind == "memfd-private"
    assert (trial.machine.ram_mib, trial.machine.vcpus) == (256, 1)
    assert (trial.workload.kind, trial.workload.seed) == ("random", 1501717207)
    assert draw(24).workload == Workload("sequential", wss_mib=32, threads=1, seed=3646985387)
    drawn = [drawn_of(draw(seed, Choice(guest="any"))) for seed in range(200)]
    assert hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16] == DIGEST


def drawn_of(trial: Trial) -> dict[str, Any]:
    """What is not at its default: a field that is added, and not drawn, changes no trial."""

    def changed(part: Any) -> dict[str, Any]:
        values = dataclasses.asdict(part)
        plain = {f.name: f.default for f in dataclasses.fields(part)}
        return {name: value for name, value in values.items() if value != plain[name]}

    return changed(trial) | {
        "machine": changed(trial.machine),
        "workload": changed(trial.workload),
        "shots": [changed(shot) for shot in trial.shots],
    }


def test_every_guest_has_its_turn() -> None:
    assert {guest for guest, _ in GUESTS} == set(LAB_GUESTS)


@given(seeds)
def test_fewer_methods_leave_the_guest_as_it_is(seed: int) -> None:
    patched = tuple(name for name, how in METHODS.items() if how.binary == "patched")
    some, one = draw(seed, Choice(methods=patched)), draw(seed, Choice(methods=("live",)))
    assert (some.machine, some.workload) == (one.machine, one.workload)
    assert {shot.method for shot in one.shots} == {"live"}


def test_everything_that_may_be_drawn_is_drawn() -> None:
    trials = many()
    assert {shot.method for trial in trials for shot in trial.shots} == set(METHODS)
    for name, values in MACHINE.items():
        found = {getattr(trial.machine, name) for trial in trials} - {LARGE_RAM_MIB}
        assert found == set(values), name
    assert any(trial.machine.ram_mib == LARGE_RAM_MIB for trial in trials)
    assert all({getattr(t, name) for t in trials} == {True, False} for name in WHOLE)
    shots = [shot for trial in trials for shot in trial.shots]
    assert {shot.state for shot in shots} == {"running", "paused", "prelaunch"}
    assert {shot.restored for shot in shots} == {True, False}
    # Several generations one after the other.
    assert any(len(t.shots) == 4 and all(s.restored for s in t.shots[1:]) for t in trials)
    for name, values in WORKLOAD.items():
        if name not in ("kind", "wss_mib"):
            assert {getattr(trial.workload, name) for trial in trials} == set(values), name
    assert {trial.workload.kind for trial in trials} == set(typing.get_args(WorkloadKind))
    assert {trial.machine.fault_around_pages for trial in trials} == set(FAULT_AROUND_PAGES)
    assert {trial.machine.chunk_kib for trial in trials} == set(CHUNK_KIB)
    assert {shot.buffer_mib for trial in trials for shot in trial.shots} >= set(BUFFER_MIB)


def test_no_parameter_of_a_guest_is_forgotten() -> None:
    """A new field of `Machine` or `Workload` has to be drawn too: list it in
    lab/verify/soak/draw.py.
    """
    fields = {field.name for field in dataclasses.fields(Machine)}
    assert set(MACHINE) == fields - NOT_DRAWN - SIZES
    kinds = {*WORKLOAD["kind"], *LATER_KINDS} - {None}
    assert kinds == set(typing.get_args(WorkloadKind))
    assert {*WORKLOAD, "seed"} == (
        {field.name for field in dataclasses.fields(Workload)} - NOT_DRAWN
    )


def test_for_the_microguest_everything_it_can_do_is_drawn() -> None:
    trials = [draw(seed, Choice(guest="micro", accel="kvm")) for seed in range(400)]
    for name, values in MICRO.items():
        assert {getattr(trial.workload, name) for trial in trials} == set(values), name
    kinds = {trial.workload.kind for trial in trials}
    assert kinds == set(typing.get_args(WorkloadKind)) - {"allocate"}
    assert {trial.machine.vcpus for trial in trials} == set(MACHINE["vcpus"])
    assert any(shot.reset for trial in trials for shot in trial.shots)


def test_guests_of_each_kind_are_drawn_in_their_shares() -> None:
    choice = Choice(guest="any", accel="auto")
    everywhere = [draw(seed, choice) for seed in range(400)]
    found = Counter((trial.machine.guest, trial.machine.accel) for trial in everywhere)
    assert set(found) == set(GUESTS)
    assert found["linux", "tcg"] > found["linux", "kvm"]
    here = Offer(kvm_guests=frozenset({"micro"}))
    some = Counter(
        (trial.machine.guest, trial.machine.accel)
        for trial in (draw(seed, choice, here) for seed in range(400))
    )
    assert some["micro", "kvm"] == found["micro", "kvm"]
    under_kvm = [draw(seed, Choice(guest="any", accel="kvm"), here) for seed in range(20)]
    assert {(trial.machine.guest, trial.machine.accel) for trial in under_kvm} == {("micro", "kvm")}
    assert some["linux", "tcg"] == found["linux", "tcg"] + found["linux", "kvm"]


def test_a_run_state_is_drawn_that_is_asked_for() -> None:
    trials = [draw(seed, Choice(states=("prelaunch",), methods=("live",))) for seed in range(20)]
    assert {shot.state for trial in trials for shot in trial.shots} == {"prelaunch"}


def test_what_is_never_drawn_has_a_reason() -> None:
    assert all(what and why for what, why in NEVER_DRAWN.items())


def test_what_a_host_lacks_is_replaced_by_what_it_has() -> None:
    bare = Offer(ram_kinds=frozenset({"anon", "memfd"}), thp_kinds=frozenset(), direct_io=False)
    rich, poor = many(), many(offer=bare)
    assert {trial.machine.ram_kind for trial in poor} == {"anon", "memfd"}
    assert not any(trial.machine.thp for trial in poor)
    assert "live-direct" not in {shot.method for trial in poor for shot in trial.shots}
    # Nothing else changes with the host.
    assert [t.workload for t in poor] == [t.workload for t in rich]
    assert [len(t.shots) for t in poor] == [len(t.shots) for t in rich]


@pytest.mark.parametrize(
    "arguments",
    [
        {"methods": ("magic",)},
        {"ram_kinds": ("silk",)},
        {"methods": ()},
        {"guest": "bsd"},
        {"simplify": ("all",)},
        {"only_shot": -1},
        {"states": ("asleep",)},
        {"states": ()},
        {"accel": "auto"},
    ],
)
def test_names_that_there_are_not_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        Choice(**arguments)
    assert caught.value.remedy


def test_an_unpatched_qemu_has_no_screen_under_tcg() -> None:
    unpatched = [trial for trial in many() if trial.variant == "unpatched"]
    with_screen = {trial.machine.accel for trial in unpatched if trial.machine.vnc}
    assert "tcg" not in with_screen
    assert any(trial.machine.vnc for trial in many() if trial.machine.accel == "tcg")
