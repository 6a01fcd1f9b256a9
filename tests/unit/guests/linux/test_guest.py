"""Obtaining the guest: what is cached, what is refused, and with which words."""

import asyncio
import shutil
from pathlib import Path

import pytest

from lab.errors import BuildError, HostError
from lab.guests.linux import initramfs, kernel, newc
from lab.guests.linux.guest import LinuxGuest

GUEST = LinuxGuest()

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("musl-gcc", "gcc", "cc")), reason="no C compiler"
)


def fake_kernel(version: str = "6.1.0-test", build_text: str = " (someone) #1 SMP") -> bytes:
    image = bytearray(4096)
    image[0x202:0x206] = b"HdrS"
    image[0x20E:0x210] = (0x600).to_bytes(2, "little")
    text = (version + build_text).encode()
    image[0x800 : 0x800 + len(text)] = text
    return bytes(image)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LAB_GUEST_KERNEL", raising=False)
    return tmp_path / "cache" / "guest"


@pytest.fixture
def own_kernel(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    image = tmp_path / "bzImage"
    image.write_bytes(fake_kernel())
    monkeypatch.setenv("LAB_GUEST_KERNEL", str(image))
    return image


def test_the_release_is_read_from_the_boot_header() -> None:
    assert kernel.kernel_release(fake_kernel("6.12.5-cloud-amd64")) == "6.12.5-cloud-amd64"


@pytest.mark.parametrize("image", [b"", b"\x7fELF" + bytes(4096), fake_kernel("", "")])
def test_what_is_no_kernel_is_refused(image: bytes) -> None:
    with pytest.raises(ValueError):
        kernel.kernel_release(image)


def test_the_initramfs_has_an_executable_init_and_a_console() -> None:
    entries = {e.path: e for e in newc.read_archive(initramfs.initramfs_archive(b"program"))}
    assert entries["init"].data == b"program"
    assert entries["init"].mode & 0o111 == 0o111
    assert entries["dev/console"].device == (5, 1)
    assert "proc" in entries


def test_the_initramfs_has_drivers_and_the_order_in_which_they_load() -> None:
    def driver(name: str, *needed: str) -> bytes:
        return b"\0license=GPL\0depends=%s\0name=%s\0" % (",".join(needed).encode(), name.encode())

    drivers = {
        "virtio_blk": driver("virtio_blk", "virtio", "virtio_ring"),
        "virtio_ring": driver("virtio_ring"),
        "virtio": driver("virtio", "virtio_ring"),
    }
    archive = initramfs.initramfs_archive(b"program", drivers)
    entries = {e.path: e.data for e in newc.read_archive(archive)}
    assert entries["modules/virtio.ko"] == drivers["virtio"]
    # virtio_pci is not there: this kernel has it built in.
    assert entries["modules/disk-virtio.list"] == b"virtio_ring\nvirtio\nvirtio_blk\n"
    assert entries["modules/disk-ide.list"] == b""


@pytest.mark.usefixtures("cache")
def test_a_guest_that_is_not_built_names_the_remedy() -> None:
    with pytest.raises(HostError) as caught:
        GUEST.find()
    assert "lab build" in caught.value.remedy


@needs_compiler
async def test_a_second_build_finds_the_first(own_kernel: Path) -> None:
    said: list[str] = []
    first = await GUEST.ensure(said.append)
    assert first.kernel == own_kernel
    assert first.kernel_version == "6.1.0-test"
    assert said == ["guest: compiling the workload"]
    assert await GUEST.ensure(said.append) == first
    assert GUEST.find() == first
    assert len(said) == 1


@needs_compiler
@pytest.mark.usefixtures("own_kernel")
async def test_two_builds_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await GUEST.ensure()
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "another" / "deeper"))
    second = await GUEST.ensure()
    assert second.initramfs != first.initramfs
    assert second.initramfs_sha256 == first.initramfs_sha256


@needs_compiler
@pytest.mark.usefixtures("own_kernel")
async def test_builds_at_the_same_time_leave_one_complete_file(cache: Path) -> None:
    guests = await asyncio.gather(*(GUEST.ensure() for _ in range(3)))
    assert len(set(guests)) == 1
    assert sorted(path.suffix for path in cache.iterdir()) == [".cpio", ".log"]


@pytest.mark.usefixtures("own_kernel")
async def test_a_compiler_that_fails_leaves_nothing_and_says_why(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'workload.c:1: error: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(initramfs, "_compiler", lambda: str(compiler))
    with pytest.raises(BuildError, match="no such thing"):
        await GUEST.ensure()
    assert [path.name for path in cache.iterdir()] == ["build.log"]


@pytest.mark.usefixtures("cache")
def test_an_override_that_is_no_kernel_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for content in (None, b"text"):
        path = tmp_path / "kernel"
        if content is not None:
            path.write_bytes(content)
        monkeypatch.setenv("LAB_GUEST_KERNEL", str(path))
        with pytest.raises(HostError, match="LAB_GUEST_KERNEL"):
            GUEST.find()


@pytest.mark.usefixtures("cache")
async def test_a_host_without_apt_is_told_about_the_override(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostError) as caught:
        await GUEST.ensure()
    assert "LAB_GUEST_KERNEL" in caught.value.remedy


APT_CACHE = """#!/bin/sh
# Knows the metapackage only with the private lists.
case "$*" in *Dir::State::lists*linux-image-cloud-amd64) ;; *) exit 100 ;; esac
echo linux-image-cloud-amd64
echo "  Depends: linux-image-9.9.9-cloud-amd64"
"""
APT_GET = """#!/bin/sh
case "$*" in *" update") exit 0 ;; esac
for package; do :; done
: > "$package.deb"
"""
DPKG_DEB = """#!/bin/sh
drivers="$3/lib/modules/9.9.9-cloud-amd64/kernel/drivers"
mkdir -p "$drivers" && printf 'depends=' > "$drivers/virtio_blk.ko"
printf '\\0depends=lost-and-found\\0' | xz > "$drivers/virtio-pci.ko.xz"
printf 'unwanted' > "$drivers/e1000.ko"
mkdir -p "$3/boot" && cp "$FAKE_KERNEL" "$3/boot/vmlinuz-9.9.9-cloud-amd64"
"""


@needs_compiler
async def test_empty_package_lists_are_replaced_by_private_ones(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, script in (("apt-cache", APT_CACHE), ("apt-get", APT_GET), ("dpkg-deb", DPKG_DEB)):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    image = tmp_path / "kernel"
    image.write_bytes(fake_kernel("9.9.9-cloud-amd64"))
    monkeypatch.setenv("FAKE_KERNEL", str(image))
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    said: list[str] = []
    guest = await GUEST.ensure(said.append)
    assert guest.kernel.read_bytes() == image.read_bytes()
    assert guest.kernel_version == "9.9.9-cloud-amd64"
    assert said == [
        "guest: fetching package lists",
        "guest: downloading linux-image-9.9.9-cloud-amd64",
        "guest: compiling the workload",
    ]
    assert GUEST.find() == guest
    entries = {e.path: e.data for e in newc.read_archive(guest.initramfs.read_bytes())}
    assert entries["modules/disk-virtio.list"] == b"virtio_pci\nvirtio_blk\n"
    assert entries["modules/virtio_pci.ko"] == b"\0depends=lost-and-found\0"
    assert "modules/e1000.ko" not in entries
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]
