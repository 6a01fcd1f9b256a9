"""Guest memory that is not as it mostly is: in huge pages of 1 GiB, locked, not zero at start, or
on a host whose kernel has no huge page of zeros.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import lab
from lab.host.needs import available_memory_mib
from lab.scenario.machine import Machine
from lab.session import VM
from lab.verify.oracle import verify_method
from lab.vm.ram import machine_option
from tests.support.bench import is_left_alone, small

pytestmark = [pytest.mark.vm, pytest.mark.platforms("micro-tcg", "micro-kvm")]

_GIGANTIC = Path("/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages")
_ZERO_PAGE = Path("/sys/kernel/mm/transparent_hugepage/use_zero_page")
_MIB = 1 << 20


@contextmanager
def setting(path: Path, value: str) -> Iterator[None]:
    """Set something of the host's until the context is left."""
    try:
        before = path.read_text().strip()
        path.write_text(value)
    except OSError as error:
        pytest.skip(f"{path} cannot be set: {error.strerror}")
    try:
        yield
    finally:
        path.write_text(before)


def backed_by(*backend: str) -> Callable[[Machine], list[str]]:
    """What takes the place of `lab.vm.ram.ram_arguments`."""

    def arguments(machine: Machine) -> list[str]:
        size = f"{machine.ram_mib}M"
        common = f"id=pc.ram,x-use-canonical-path-for-ramblock-id=off,size={size},share=on"
        return ["-m", size, "-object", ",".join([backend[0], common, *backend[1:]])]

    return arguments


def resident_mib(vm: VM, name: str) -> int:
    """A number of MiB from the kernel's status of QEMU: `VmHWM` is the most that was resident."""
    for line in Path(f"/proc/{vm.pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) // 1024
    raise AssertionError(f"the kernel does not say {name}")


@pytest.mark.parametrize("method", ["live", "live-mapped"])
async def test_huge_pages_of_a_gib_are_taken(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are larger than a piece that is protected at a time."""
    if available_memory_mib() < 6 * 1024:
        pytest.skip("huge pages of 1 GiB and a buffer for them need 6 GiB of memory")
    with setting(_GIGANTIC, "1"):
        if _GIGANTIC.read_text().strip() != "1":
            pytest.skip("this host has no huge page of 1 GiB")
        machine = Machine(ram_mib=1024, ram_kind="memfd")
        gigantic = backed_by("memory-backend-memfd", "hugetlb=on", "hugetlbsize=1G")
        with monkeypatch.context() as patch:
            patch.setattr("lab.vm.commandline.ram_arguments", gigantic)
            booted = lab.boot(machine, lab.Workload("random", wss_mib=64))
            vm = await booted.__aenter__()
        try:
            size = {"x-snapshot-buffer-size": 3 << 30}
            await vm.execute("migrate-set-parameters", size)
            found = await verify_method(vm, method, tmp_path)
            assert found.equal, found.detail
            await is_left_alone(vm)
        finally:
            await booted.__aexit__(None, None, None)


async def test_a_host_without_a_huge_page_of_zeros_allocates_nothing(tmp_path: Path) -> None:
    """Reading memory that was never used takes none."""
    with setting(_ZERO_PAGE, "0"):
        machine = Machine(ram_mib=1024, thp=True)
        async with lab.boot(machine, lab.Workload("random", wss_mib=16)) as vm:
            before = resident_mib(vm, "VmHWM")
            found = await verify_method(vm, "live", tmp_path)
            assert found.equal, found.detail
            # The buffers, the log and the instrument's own reading.
            assert resident_mib(vm, "VmHWM") - before < 256
            await is_left_alone(vm)


async def test_locked_memory_is_not_filled_up_by_the_fault_log(tmp_path: Path) -> None:
    """The log takes memory for what is logged, and not for what might be."""
    machine, workload = small(vcpus=2)
    machine = Machine(ram_mib=machine.ram_mib, vcpus=2, extra_args=("-overcommit", "mem-lock=on"))
    if os.geteuid() != 0:
        pytest.skip("only root may lock so much memory")
    async with lab.boot(machine, workload) as vm:
        before = resident_mib(vm, "VmHWM")
        taken = await vm.snapshot(tmp_path / "a.snap", "live", progress=False, storage_mib_per_s=64)
        assert len(taken.df_faults()) > 0
        assert resident_mib(vm, "VmHWM") - before < 64
        await is_left_alone(vm)


@pytest.mark.parametrize("method", ["live-mapped", "live"])
async def test_a_file_that_was_used_before_is_cleared_by_a_restore(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the image says is zero is zero afterwards, whatever the memory held."""
    machine, workload = small()
    used = tmp_path / "used"
    used.write_bytes(b"\xa5" * (machine.ram_mib * _MIB))
    async with lab.boot(machine, workload) as vm:
        # The options that are there for any backend, for a guest whose RAM had none.
        option = machine_option(dataclasses.replace(machine, ram_kind="memfd"))
        monkeypatch.setattr("lab.vm.commandline.machine_option", lambda machine: option)
        monkeypatch.setattr(
            "lab.vm.commandline.ram_arguments", backed_by("memory-backend-file", f"mem-path={used}")
        )
        found = await verify_method(vm, method, tmp_path)
        assert found.equal, found.detail
