"""Whatever backs guest RAM, an image is the guest, and a snapshot takes no more than it has to."""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest

import lab
from lab.errors import HostError
from lab.host.info import thp_settings
from lab.host.memory import Residency, residency
from lab.measure.sample import filesystem_of
from lab.scenario.machine import HUGE_PAGE_MIB, RamKind
from lab.session import VM
from lab.verify.oracle import verify_method

pytestmark = [pytest.mark.vm, pytest.mark.platforms("tcg", "kvm", "micro-kvm")]

Reserve = Callable[[int], str]

RAM_MIB = 160
HUGE_PAGE_BYTES = HUGE_PAGE_MIB << 20
PATCHED = ("live", "live-rfc", "live-inline", "live-mapped")
#: How /proc/PID/maps shows the RAM of each kind: permissions, and what the name begins with.
MAPPINGS: dict[RamKind, tuple[str, str]] = {
    "memfd": ("rw-s", "/memfd:memory-backend-memfd (deleted)"),
    "memfd-private": ("rw-p", "/memfd:memory-backend-memfd (deleted)"),
    "file": ("rw-s", "/dev/shm/"),
    "file-private": ("rw-p", "/dev/shm/"),
    "hugetlb": ("rw-s", "/memfd:memory-backend-memfd (deleted)"),
}
QUIET = lab.Workload("idle", wss_mib=16)


def machine(kind: RamKind, *, vcpus: int = 1, thp: bool | None = None) -> lab.Machine:
    return lab.Machine(ram_mib=RAM_MIB, ram_kind=kind, vcpus=vcpus, thp=thp)


def mapping_at(pid: int, address: int) -> tuple[str, str]:
    """Permissions and name of the mapping that begins at an address."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        where, permissions, _, _, _, *name = line.split(None, 5)
        if int(where.split("-")[0], 16) == address:
            return permissions, name[0] if name else ""
    raise AssertionError(f"nothing is mapped at {address:#x}")


async def ram_of(vm: VM) -> Residency:
    (block,) = [block for block in await vm.ram_blocks() if block.name == "pc.ram"]
    return residency(vm.pid, block.host_address, block.used_bytes)


@pytest.mark.parametrize("kind", [kind for kind in get_args(RamKind) if kind != "anon"])
async def test_restored_memory_is_that_of_the_pause_instant_whatever_backs_it(
    kind: RamKind, tmp_path: Path, reserve_huge_pages: Reserve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LAB_RAM_DIR", raising=False)
    if kind == "hugetlb" and (problem := reserve_huge_pages(2 * RAM_MIB)):
        pytest.skip(problem)
    workload = lab.Workload("random", wss_mib=24, threads=2)
    async with lab.boot(machine(kind, vcpus=2), workload) as vm:
        (block,) = [block for block in await vm.ram_blocks() if block.name == "pc.ram"]
        permissions, name = mapping_at(vm.pid, block.host_address)
        assert permissions == MAPPINGS[kind][0]
        assert name.startswith(MAPPINGS[kind][1])
        assert block.page_bytes == (HUGE_PAGE_BYTES if kind == "hugetlb" else 4096)
        for method in PATCHED:
            found = await verify_method(vm, method, tmp_path)
            assert found.equal, f"{method}: {found.detail}"
            assert found.pages_compared >= RAM_MIB * 256
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["memfd", "hugetlb"])
async def test_upstreams_own_snapshot_takes_shared_memory_too(
    kind: RamKind, tmp_path: Path, reserve_huge_pages: Reserve
) -> None:
    if kind == "hugetlb" and (problem := reserve_huge_pages(2 * RAM_MIB)):
        pytest.skip(problem)
    workload = lab.Workload("random", wss_mib=24)
    async with lab.boot(machine(kind), workload, binary="unpatched") as vm:
        found = await verify_method(vm, "background", tmp_path)
        assert found.equal, found.detail


async def test_huge_pages_to_which_nobody_writes_stay_huge(tmp_path: Path) -> None:
    if thp_settings().get("enabled", "never") == "never":
        pytest.skip("this host has no transparent huge pages")
    async with lab.boot(machine("anon", thp=True), QUIET) as vm:
        before = await ram_of(vm)
        if before.anon_huge == 0:
            pytest.skip("this host has no huge page to give")
        taken = await vm.snapshot(tmp_path / "a.snap", "live", progress=False)
        after = await ram_of(vm)
    faults = taken.df_faults()
    offsets = faults.loc[faults["block"] == "pc.ram", "offset"]
    # A page that is written to is released by itself, so the huge page around it is split.
    split = len((offsets // HUGE_PAGE_BYTES).unique()) * HUGE_PAGE_BYTES
    assert after.anon_huge >= before.anon_huge - split


SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


@pytest.fixture
def advise_shared() -> Iterator[None]:
    """The host has transparent huge pages in memfds, for who asks for them."""
    before = thp_settings().get("shmem_enabled")
    if before is None or not os.access(SHMEM_ENABLED, os.W_OK):
        pytest.skip("this host's setting for huge pages in shared memory cannot be changed")
    # A shell that outlives whatever ends this process puts it back.
    script = f"trap '' INT TERM HUP; read -r _; echo {before} > {SHMEM_ENABLED}"
    restorer = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, start_new_session=True)
    try:
        SHMEM_ENABLED.write_text("advise")
        yield
    finally:
        restorer.communicate()
    assert thp_settings()["shmem_enabled"] == before


@pytest.mark.parametrize("kind", ["memfd", "file", "memfd-private", "file-private"])
async def test_memory_of_a_file_begins_where_a_huge_page_can(
    kind: RamKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field report F13."""
    monkeypatch.delenv("LAB_RAM_DIR", raising=False)
    async with lab.boot(machine(kind), QUIET) as vm:
        (block,) = [block for block in await vm.ram_blocks() if block.name == "pc.ram"]
        assert block.host_address % HUGE_PAGE_BYTES == 0


@pytest.mark.usefixtures("advise_shared")
async def test_a_memfd_has_transparent_huge_pages_and_is_the_guest_then_too(tmp_path: Path) -> None:
    """Field report F13."""
    workload = lab.Workload("random", wss_mib=24)
    async with lab.boot(machine("memfd", thp=True), workload) as vm:
        (block,) = [block for block in await vm.ram_blocks() if block.name == "pc.ram"]
        if not shared_huge_bytes(vm.pid, block.host_address):
            pytest.skip("this host has no huge page to give")
        for method in PATCHED:
            found = await verify_method(vm, method, tmp_path)
            assert found.equal, f"{method}: {found.detail}"
    with pytest.raises(HostError, match=r"unpatched QEMU.*multiple of 2 MiB"):
        async with lab.boot(machine("memfd", thp=True), workload, binary="unpatched"):
            pass


def shared_huge_bytes(pid: int, address: int) -> int:
    """How much of the shared mapping at an address is mapped by huge pages."""
    found = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-", line):
            found = int(line.split("-")[0], 16) == address
        elif found and line.startswith("ShmemPmdMapped:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"nothing is mapped at {address:#x}")


async def test_a_live_snapshot_allocates_no_memory_that_the_guest_does_not_use(
    tmp_path: Path,
) -> None:
    for kind in ("anon", "memfd", "file"):
        async with lab.boot(machine(kind), QUIET) as vm:
            before = await ram_of(vm)
            await vm.snapshot(tmp_path / "a.snap", "live", progress=False)
            after = await ram_of(vm)
        # Much of the guest's RAM is unused; the guest itself may take a little more of it.
        assert before.resident < RAM_MIB * 3 // 4 << 20
        assert after.resident - before.resident < RAM_MIB // 16 << 20, kind


async def test_a_file_has_no_name_while_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_RAM_DIR", str(tmp_path))
    async with lab.boot(machine("file"), QUIET, binary="unpatched") as vm:
        (block,) = [block for block in await vm.ram_blocks() if block.name == "pc.ram"]
        permissions, name = mapping_at(vm.pid, block.host_address)
        assert permissions == "rw-s"
        assert re.fullmatch(rf"{re.escape(str(tmp_path))}/\S+ \(deleted\)", name)
        assert list(tmp_path.iterdir()) == []


async def test_a_file_that_can_not_be_protected_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if filesystem_of(tmp_path) == "tmpfs":
        pytest.skip("temporary files are on a tmpfs, which can be protected")
    monkeypatch.setenv("LAB_RAM_DIR", str(tmp_path))
    async with lab.boot(machine("file"), QUIET) as vm:
        for method in ("live", "live-inline"):
            with pytest.raises(HostError, match=f"{method} cannot .* kind file: .*LAB_RAM_DIR"):
                await vm.snapshot(tmp_path / "a.snap", method, progress=False)
        assert await vm.is_running()
        # An ordinary migration protects nothing.
        found = await verify_method(vm, "migrate-to-file", tmp_path)
        assert found.equal, found.detail


async def test_huge_pages_that_are_not_there_are_refused_before_qemu_starts() -> None:
    # More than any host has in huge pages, but for one whose memory is all huge pages.
    pages = lab.Machine(ram_mib=1024 * 1024, ram_kind="hugetlb")
    with pytest.raises(HostError, match=r"need 524288 huge pages .* "):
        async with lab.boot(pages, QUIET):
            pass
