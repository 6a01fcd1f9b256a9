"""What each mechanism does to QEMU, and in which order."""

import asyncio
from typing import Any, cast

import pytest

from lab.errors import QmpError
from lab.scenario.methods import METHODS
from lab.session import VM
from lab.snapshot.mechanisms import mechanism_of
from lab.snapshot.mechanisms.base import Course


class RecordingVM:
    """A QEMU that notes what it is told."""

    def __init__(self, *statuses: str) -> None:
        self.told: list[str] = []
        self.statuses = iter(statuses)

    async def stop(self) -> None:
        self.told.append("stop")

    async def cont(self) -> None:
        self.told.append("cont")

    async def status(self) -> str:
        self.told.append("status")
        return next(self.statuses)

    async def execute(self, command: str, *arguments: object) -> dict[str, Any]:
        self.told.append(command)
        return {"status": "active", "ram": {"normal": 1}}

    async def migrate(self) -> None:
        self.told.append("migrate")

    async def hold(self) -> None:
        self.told.append("hold")


def told(method: str, variant: str, *, held: bool, was_running: bool = True) -> list[str]:
    """What QEMU is told from the request until its vCPUs go on; `completed` is its report."""
    vm = RecordingVM("finish-migrate", "postmigrate")
    mechanism = mechanism_of(METHODS[method], variant)
    course = Course(
        vm=cast(VM, vm),
        migrate=vm.migrate,
        hold=vm.hold if held else None,
        was_running=was_running,
    )

    async def work() -> None:
        await mechanism.request(course)
        vm.told.append("completed")
        await mechanism.finish(course)

    asyncio.run(work())
    return vm.told


@pytest.mark.parametrize("method", METHODS)
def test_each_method_has_a_mechanism_on_every_qemu_that_runs_it(method: str) -> None:
    variants = [v for v in ("patched", "unpatched") if METHODS[method].runs_on(v)]
    assert variants
    for variant in variants:
        mechanism = mechanism_of(METHODS[method], variant)
        assert set(METHODS[method].capabilities) <= set(mechanism.capabilities(hold=False))


@pytest.mark.parametrize("held", [False, True])
def test_stop_and_copy_stops_the_guest_first_and_lets_it_go_on_at_once(held: bool) -> None:
    holding = ["hold"] if held else []
    expected = ["stop", "migrate", "completed", *holding, "status", "status", "cont"]
    assert told("stop-and-copy", "unpatched", held=held) == expected


def test_a_precopy_stops_nothing_itself_and_is_held_once_it_is_complete() -> None:
    expected = ["migrate", "completed", "hold", "status", "status", "cont"]
    assert told("migrate-to-file", "patched", held=True) == expected


@pytest.mark.parametrize("method", ["migrate-to-file", "stop-and-copy"])
def test_a_guest_that_was_stopped_stays_stopped(method: str) -> None:
    assert "cont" not in told(method, "patched", held=False, was_running=False)


def test_a_live_snapshot_is_only_asked_for() -> None:
    # QEMU holds it, and lets the vCPUs go on.
    assert told("live", "patched", held=True) == ["migrate", "completed"]
    assert told("background", "unpatched", held=False) == ["migrate", "completed"]


def test_the_unpatched_background_is_held_before_the_request() -> None:
    expected = ["stop", "hold", "migrate", "query-migrate", "cont", "completed"]
    assert told("background", "unpatched", held=True) == expected


def test_only_the_patched_background_is_asked_for_an_engine_a_log_and_a_hold() -> None:
    patched = mechanism_of(METHODS["live-rfc"], "patched")
    assert patched.parameters("log") == {
        "x-snapshot-engine": "rfc",
        "x-snapshot-fault-log": "log",
    }
    assert patched.overlays
    assert patched.capabilities(hold=True)["pause-before-switchover"]
    for method in ("background", "migrate-to-file", "stop-and-copy"):
        other = mechanism_of(METHODS[method], "unpatched")
        assert not other.parameters("")
        assert not other.overlays
        assert not other.capabilities(hold=True).get("pause-before-switchover")


def test_only_a_precopy_is_given_room_for_pages_that_are_written_again() -> None:
    sizes = {
        name: mechanism_of(how, how.preferred_variant).expected_bytes(1000)
        for name, how in METHODS.items()
    }
    assert {name for name, size in sizes.items() if size != 1000} == {"migrate-to-file"}
    assert sizes["migrate-to-file"] == 1500


def test_what_qemu_says_of_a_refusal_is_explained_only_where_memory_is_protected() -> None:
    vm = cast(VM, RecordingVM())
    error = QmpError("something else")
    for how in METHODS.values():
        assert mechanism_of(how, how.preferred_variant).explain(vm, error) is None
