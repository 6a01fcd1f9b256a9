"""An image is restored as its sidecar says, or refused in one line."""

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lab.disks.frozen import FrozenDisk, Stamp
from lab.errors import RestoreError
from lab.guests.protocol import ReadyRecord
from lab.qemu.build import QemuBinary
from lab.scenario.machine import Machine
from lab.scenario.workload import Workload
from lab.snapshot.checksums import Checksums
from lab.snapshot.image import check_image, open_image, read_sidecar
from lab.snapshot.sidecar import Sidecar, sidecar_path
from lab.vm.argv import CommandLine

IMAGE = b"image"
SUMS = Checksums(
    piece_bytes=4,
    sha256=(hashlib.sha256(IMAGE[:4]).hexdigest(), hashlib.sha256(IMAGE[4:]).hexdigest()),
)
SIDECAR = Sidecar(
    method="live-rfc",
    engine="rfc",
    machine=Machine(ram_mib=512, vcpus=2, extra_args=("-device", "virtio-rng-pci")),
    workload=Workload("sequential", wss_mib=64, threads=2, seed=2**63 - 1),
    machine_type="pc-i440fx-10.0",
    image_bytes=5,
    mark=None,
    checksums=SUMS,
    created_utc="2026-01-01T00:00:00+00:00",
    ready=ReadyRecord(
        nonce=2**64 - 1, progress_gpa=4096, wss_pages=16384, threads=2, seed=1, kind="sequential"
    ),
    binary=QemuBinary(
        path=Path("/qemu"),
        variant="patched",
        version="10.0.2",
        build_id="x",
        series_sha256=None,
        sha256="0" * 64,
    ),
    kernel_sha256="0" * 64,
    disks=(),
    line=None,
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.snap"
    path.write_bytes(IMAGE)
    sidecar_path(path).write_text(SIDECAR.to_text())
    return path


def rewrite(image: Path, **changes: Any) -> None:
    path = sidecar_path(image)
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


def test_a_sidecar_survives_its_file(image: Path) -> None:
    assert read_sidecar(image) == SIDECAR


def test_a_guest_that_was_booting_has_said_nothing(image: Path) -> None:
    booting = msgspec.structs.replace(SIDECAR, ready=None)
    sidecar_path(image).write_text(booting.to_text())
    assert read_sidecar(image) == booting


def test_the_sidecar_of_an_image_that_has_no_mark_yet_is_read(image: Path) -> None:
    rewrite(image, format="lab.snapshot/2", mark=..., disks=..., line=...)
    assert read_sidecar(image) == SIDECAR


def test_the_sidecar_of_an_image_that_could_have_no_disks_yet_is_read(image: Path) -> None:
    rewrite(image, format="lab.snapshot/3", disks=..., line=...)
    assert read_sidecar(image) == SIDECAR


def test_the_frozen_disks_of_a_vm_and_how_it_was_started_survive(image: Path) -> None:
    disk = FrozenDisk(
        node="disk0",
        layer="/l/a.qcow2",
        format="qcow2",
        virtual_bytes=1 << 30,
        named="/d.raw",
        stands_on=(Stamp(path="/d.raw", bytes=1 << 30, mtime_ns=1),),
    )
    line = CommandLine(Path("/usr/bin/qemu"), ("-hda", "d,,.raw"), Path("/"))
    users = msgspec.structs.replace(
        SIDECAR, machine=Machine(image=("/d.raw",)), disks=(disk,), line=line, ready=None
    )
    sidecar_path(image).write_text(users.to_text())
    assert read_sidecar(image) == users


def test_an_image_may_have_no_checksums(image: Path) -> None:
    without = msgspec.structs.replace(SIDECAR, checksums=None)
    sidecar_path(image).write_text(without.to_text())
    assert read_sidecar(image) == without


async def test_an_image_is_checked_against_its_sidecar(
    image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_image(image) as opened:
        await check_image(opened)
    image.write_bytes(b"imagE")
    with (
        open_image(image) as opened,
        pytest.raises(RestoreError, match=r"a\.snap is damaged: bytes 4 to 4 are not"),
    ):
        await check_image(opened)
    image.write_bytes(b"iMagE")
    with (
        open_image(image) as opened,
        pytest.raises(RestoreError, match="bytes 0 to 3 and 1 more places are not"),
    ):
        await check_image(opened)
    assert not caplog.records


async def test_that_nobody_can_tell_whether_an_image_is_damaged_is_said_in_a_warning(
    image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Field report F18."""
    rewrite(image, checksums=None)
    image.write_bytes(b"imagE")
    with open_image(image) as opened:
        await check_image(opened)
    assert [(one.levelname, one.getMessage()) for one in caplog.records] == [
        ("WARNING", "a.snap has no checksums: if it is damaged, nobody can tell")
    ]


async def test_an_image_that_is_cut_short_while_it_is_checked_is_refused(image: Path) -> None:
    with open_image(image) as opened:
        image.write_bytes(b"")
        with pytest.raises(RestoreError, match=r"cannot be read: it ends at byte \d"):
            await check_image(opened)


def refused(image: Path) -> str:
    with pytest.raises(RestoreError) as caught:
        read_sidecar(image)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    assert "there is no image" in refused(tmp_path / "b.snap")


def test_an_image_without_sidecar_is_not_complete(image: Path) -> None:
    sidecar_path(image).unlink()
    assert "no sidecar" in refused(image)


def test_a_truncated_image_is_refused_with_both_sizes(image: Path) -> None:
    image.write_bytes(b"imag")
    line = refused(image)
    assert "4 bytes" in line
    assert "had 5" in line


def test_another_format_is_refused(image: Path) -> None:
    rewrite(image, format="lab.snapshot/1")
    assert "lab.snapshot/1" in refused(image)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_bytes": "5"},
        {"image_bytes": ...},
        {"surprise": 1},
        {"checksums": ...},
        {"checksums": 3},
        {"checksums": {"piece_bytes": 4, "sha256": ["0"]}},
        {"checksums": {"piece_bytes": 0, "sha256": []}},
        {"machine": {"ram_mib": 1}},
        {"machine": {"colour": "red"}},
        {"machine": 3},
        {"ready": 3},
        {"ready": {"nonce": "xyz"}},
        {"binary": {"path": 3}},
        {"format": ...},
    ],
)
def test_what_is_no_sidecar_is_refused(image: Path, changes: dict[str, Any]) -> None:
    rewrite(image, **changes)
    assert refused(image)


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "\0"])
def test_what_is_no_json_object_is_refused(image: Path, content: str) -> None:
    sidecar_path(image).write_text(content)
    assert "is not a sidecar" in refused(image)


def test_the_boot_before_is_kept_and_may_be_missing(image: Path) -> None:
    rewrite(image, ready=None, boot_before="00000000deadbeef")
    assert read_sidecar(image).boot_before == "00000000deadbeef"
    rewrite(image, ready=None, boot_before=...)
    assert read_sidecar(image).boot_before is None
