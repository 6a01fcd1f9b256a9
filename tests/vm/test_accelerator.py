"""Which accelerator "auto" is: what a real guest was seen to run under, and never silently less."""

import logging

import pytest

import lab
from lab.doctor import kvm_checks
from lab.scenario.machine import GuestKind
from lab.vm import accelerator
from lab.vm.accelerator import kvm_guest_problem, settled

pytestmark = [pytest.mark.vm, pytest.mark.platforms("tcg")]


@pytest.fixture(autouse=True)
def nothing_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As outside of tests, where no platform is imposed on guests and nothing is known yet."""
    for room in ("lab.vm.boot", "lab.snapshot.restore"):
        monkeypatch.setattr(f"{room}.settled", settled)
    monkeypatch.setattr(accelerator, "_found", {})


@pytest.mark.parametrize("guest", ["linux", "micro"])
async def test_auto_is_kvm_exactly_where_such_a_guest_ran_under_it(
    guest: GuestKind, caplog: pytest.LogCaptureFixture
) -> None:
    machine = lab.Machine(ram_mib=128, guest=guest, accel="auto")
    with caplog.at_level(logging.WARNING):
        async with lab.boot(machine, lab.Workload(wss_mib=8)) as vm:
            info = await vm.execute("query-kvm")
    problem = await kvm_guest_problem(guest)
    assert info["enabled"] == (problem == "")
    assert vm.machine.accel == ("kvm" if info["enabled"] else "tcg")
    assert vm.fallback == problem
    assert (f"accel auto is tcg, not kvm: {problem}" in caplog.text) == (problem != "")


async def test_a_guest_that_does_not_boot_under_kvm_is_why_it_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if problem := await kvm_guest_problem("micro"):
        pytest.skip(problem)
    accelerator._found.clear()
    # As under a KVM that runs an instruction and no guest.
    monkeypatch.setattr(accelerator, "PROBE_TIMEOUT_S", 0)
    chosen = await settled(lab.Machine(guest="micro", accel="auto"))
    assert chosen.machine.accel == "tcg"
    assert "did not boot" in chosen.fallback


async def test_the_doctor_says_of_each_guest_what_was_tried() -> None:
    checks = {check.name: check for check in await kvm_checks()}
    assert set(checks) == {"kvm, Linux guest", "kvm, microguest"}
    guests: dict[GuestKind, str] = {"linux": "kvm, Linux guest", "micro": "kvm, microguest"}
    for guest, name in guests.items():
        problem = await kvm_guest_problem(guest)
        check = checks[name]
        assert (check.status, check.detail) == (
            ("warn", problem) if problem else ("ok", "a guest booted and worked")
        )
