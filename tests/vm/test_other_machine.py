"""An image goes into the machine that it was taken of, or is refused in one line.

A sidecar that says something else than its image is one that was edited, or is another image's.
"""

import dataclasses
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

import lab
from lab.scenario.methods import METHODS
from lab.snapshot.image import read_sidecar
from lab.snapshot.sidecar import Sidecar, sidecar_path
from tests.support.bench import refusal

pytestmark = [
    pytest.mark.vm,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.platforms("micro-tcg", "micro-kvm"),
]

RAM_MIB = 64


@dataclass(frozen=True)
class Taken:
    image: Path
    sidecar: Sidecar

    def tell(self, **changes: Any) -> None:
        """Have the sidecar say something else."""
        changed = msgspec.structs.replace(self.sidecar, **changes)
        sidecar_path(self.image).write_text(changed.to_text())


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=["live", "live-mapped", "migrate-to-file"]
)
async def taken(
    request: pytest.FixtureRequest, platform: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Taken]:
    image = tmp_path_factory.mktemp("taken") / "a.snap"
    device = ("-device", "virtio-rng-pci")
    machine = lab.Machine(guest="micro", ram_mib=RAM_MIB, extra_args=device)
    binary = METHODS[request.param].preferred_variant
    async with lab.boot(machine, lab.Workload("random", wss_mib=16), binary=binary) as vm:
        await vm.snapshot(image, request.param, progress=False)
    found = Taken(image, read_sidecar(image))
    yield found


@pytest.mark.parametrize("ram_mib", [RAM_MIB // 2, RAM_MIB * 2])
async def test_another_ram_size_is_refused_with_both_sizes(taken: Taken, ram_mib: int) -> None:
    if taken.sidecar.method == "migrate-to-file" and ram_mib < RAM_MIB:
        pytest.skip("as with the larger one")
    taken.tell(machine=dataclasses.replace(taken.sidecar.machine, ram_mib=ram_mib))
    line = await refusal(taken.image)
    assert "Size mismatch: pc.ram" in line
    assert f"{RAM_MIB << 20:x}" in line
    assert f"{ram_mib << 20:x}" in line


async def test_another_machine_type_is_refused(taken: Taken) -> None:
    taken.tell(machine_type="pc-i440fx-9.0")
    line = await refusal(taken.image)
    assert "cannot be restored" in line
    assert "pc-i440fx-9.0" in line


async def test_a_machine_type_that_qemu_does_not_know_is_refused(taken: Taken) -> None:
    taken.tell(machine_type="pc-i440fx-99.0")
    line = await refusal(taken.image)
    assert "pc-i440fx-99.0" in line
    assert "restore with the QEMU version that took the snapshot" in line


async def test_a_machine_without_a_device_that_the_image_has_is_refused(taken: Taken) -> None:
    taken.tell(machine=dataclasses.replace(taken.sidecar.machine, extra_args=()))
    assert "virtio-rng" in await refusal(taken.image)


async def test_a_stream_taken_for_the_other_format_is_refused(taken: Taken) -> None:
    other = "live" if taken.sidecar.method == "live-mapped" else "live-mapped"
    taken.tell(method=other)
    assert "cannot be restored" in await refusal(taken.image)
