"""Fixtures of tests that run guests."""

import asyncio
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

import lab
from lab.host.needs import huge_pages
from lab.host.probe import KVM_DEVICE
from lab.host.workdir import private_folder
from lab.qemu.build import find_qemu
from lab.scenario.machine import HUGE_PAGE_MIB, Accel, GuestKind, Machine
from lab.session import VM
from lab.vm.accelerator import Settled, kvm_guest_problem

PLATFORMS: dict[str, tuple[GuestKind, Accel]] = {
    "tcg": ("linux", "tcg"),
    "kvm": ("linux", "kvm"),
    "micro-tcg": ("micro", "tcg"),
    "micro-kvm": ("micro", "kvm"),
}
"""What a test's guests are, by the name that is part of the test's."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test of guests on each platform that its marker names, by default on Linux under
    either accelerator.

    Where a test has the microguest, which boots in a moment, Linux is left to `make test-all`.
    """
    marker = metafunc.definition.get_closest_marker("platforms")
    names = marker.args if marker else ("tcg", "kvm")
    quick = [name for name in names if _is_quick(name)]
    platforms = [
        pytest.param(name, marks=() if name in quick or not quick else pytest.mark.thorough)
        for name in names
    ]
    metafunc.parametrize("platform", platforms, indirect=True, scope="module")


def _is_quick(name: str) -> bool:
    guest, accel = PLATFORMS[name]
    return guest == "micro" and (accel == "tcg" or os.access(KVM_DEVICE, os.R_OK | os.W_OK))


@pytest.fixture(scope="module", autouse=True)
def platform(request: pytest.FixtureRequest) -> Iterator[str]:
    """The platform on which the guests of a test are booted and restored.

    Whatever machine is asked for, it is one of that platform, unless it has devices that no
    microguest drives: such a test is Linux's.
    """
    name: str = request.param
    guest, accel = PLATFORMS[name]
    if accel == "kvm" and (problem := asyncio.run(kvm_guest_problem(guest))):
        pytest.skip(f"{name}: {problem}")

    async def settled(machine: Machine) -> Settled:
        if machine.accel == "kvm":
            # No test asks for that by name: this is a probe of the accelerator.
            return Settled(machine=machine)
        if machine.is_users:
            return Settled(machine=dataclasses.replace(machine, accel=accel))
        return Settled(machine=dataclasses.replace(machine, guest=guest, accel=accel))

    with pytest.MonkeyPatch.context() as patch:
        for room in ("lab.vm.boot", "lab.snapshot.restore"):
            patch.setattr(f"{room}.settled", settled)
        yield name


_NR_HUGEPAGES = Path(f"/sys/kernel/mm/hugepages/hugepages-{HUGE_PAGE_MIB * 1024}kB/nr_hugepages")


@pytest.fixture
def reserve_huge_pages() -> Iterator[Callable[[int], str]]:
    """A function that sees to it that so many MiB of huge pages can be had, until the test ends.

    It returns why not, where that needs permission or memory that is not there.
    """
    before = huge_pages()[0]
    # Others may reserve some meanwhile, which is theirs.
    ours = False

    def reserve(needed_mib: int) -> str:
        nonlocal ours
        reserved, available = huge_pages()
        missing = -(-needed_mib // HUGE_PAGE_MIB) - available
        if missing <= 0:
            return ""
        try:
            _NR_HUGEPAGES.write_text(str(reserved + missing))
        except OSError as error:
            return f"huge pages cannot be reserved: {error.strerror}"
        ours = True
        if huge_pages()[1] * HUGE_PAGE_MIB < needed_mib:
            return f"this host has no {needed_mib} MiB of huge pages"
        return ""

    yield reserve
    if ours and huge_pages()[0] != before:
        _NR_HUGEPAGES.write_text(str(before))


@pytest.fixture(params=["patched", "unpatched", "system"])
def qemu(request: pytest.FixtureRequest) -> Path:
    """A QEMU to start by hand: the lab's, or the system's if it has one."""
    if request.param != "system":
        return find_qemu(request.param).path
    found = shutil.which("qemu-system-x86_64")
    if found is None:
        pytest.skip("this system has no qemu-system-x86_64")
    return Path(found)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for sockets.  The test's own has too long a name for them."""
    with private_folder("lab-foreign-") as made:
        yield made


@pytest.fixture
def damage_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte of one page of every image is changed before the oracle restores it.

    For images that are a stream of pages.  In one where each page has its place, the middle may
    be a hole that nobody reads.
    """

    def restore_damaged(
        path: Path, *, paused: bool, channels: int, check: bool
    ) -> AbstractAsyncContextManager[VM]:
        with path.open("r+b") as file:
            # The middle of the image is page data, of which a header is a 512th.
            file.seek(path.stat().st_size // 2 // 4096 * 4096 + 2048)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 0x40]))
        return lab.restore(path, paused=paused, channels=channels, check=check)

    monkeypatch.setattr("lab.verify.oracle.restore", restore_damaged)
