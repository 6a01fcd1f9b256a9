"""The microguest's ROM is made, keyed and told what to do as the host and the guest agree."""

import re
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.errors import BuildError, GuestError, HostError, UsageError
from lab.guests import protocol
from lab.guests.linux import initramfs
from lab.guests.micro import build as micro
from lab.guests.micro.guest import Microguest
from lab.scenario.machine import Accel, Machine
from lab.scenario.scenario import check_fit
from lab.scenario.workload import Workload, WorkloadKind

GUEST = Microguest()
FOLDER = Path(micro.__file__).parent

needs_compiler = pytest.mark.skipif(
    any(shutil.which(name) is None for name in ("gcc", "ld", "objcopy")), reason="no compiler"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "guest"


def defined(header: str) -> dict[str, int]:
    """The numbers that a header defines."""
    text = (FOLDER / header).read_text()
    return {name: int(value, 0) for name, value in re.findall(r"#define (\w+) (\w+)$", text, re.M)}


def test_a_microguest_that_is_not_built_names_the_remedy() -> None:
    with pytest.raises(HostError) as caught:
        GUEST.find()
    assert "lab build" in caught.value.remedy


@needs_compiler
async def test_a_second_build_finds_the_first_and_another_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    first = await GUEST.ensure(said.append)
    assert said == ["guest: compiling the microguest"]
    assert await GUEST.ensure(said.append) == first == GUEST.find()
    assert len(said) == 1
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "another"))
    second = await GUEST.ensure()
    assert second.rom != first.rom
    assert second.kernel_sha256 == first.kernel_sha256


@needs_compiler
async def test_what_does_not_compile_leaves_no_rom_and_names_the_log(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micro, "_CFLAGS", (*micro._CFLAGS, "-fno-such-flag"))
    with pytest.raises(BuildError, match="gcc failed") as caught:
        await GUEST.ensure()
    assert "log" in caught.value.remedy
    assert not list(cache.glob("*.rom"))


@needs_compiler
async def test_the_rom_begins_where_a_processor_does(cache: Path) -> None:
    rom = (await GUEST.ensure()).rom.read_bytes()
    assert len(rom) == micro.ROM_BYTES
    # A far jump out of the last 16 bytes, into the segment in which the ROM begins.
    opcode, _, segment = struct.unpack_from("<BHH", rom, micro.ROM_BYTES - 16)
    assert (opcode, segment << 4) == (0xEA, micro.ROM_ADDRESS)
    assert not any(rom[micro.PARAMETERS_ADDRESS - micro.ROM_ADDRESS :][:128])


def test_both_sides_have_the_same_addresses() -> None:
    memory = defined("memory.h")
    for name in ("ROM_ADDRESS", "PARAMETERS_ADDRESS", "PROGRESS_ADDRESS"):
        assert memory[name] == getattr(micro, name)
    assert memory["RESET_ADDRESS"] == micro.ROM_ADDRESS + micro.ROM_BYTES - 16
    stacks = memory["STACKS_ADDRESS"] + (protocol.MAX_THREADS << memory["STACK_SHIFT"])
    assert stacks <= memory["FREE_ADDRESS"]


def test_both_sides_have_the_same_words_for_a_refusal_and_the_same_flags() -> None:
    text = (FOLDER / "main.c").read_text()
    reasons = {int(number) for number in re.findall(r"REFUSED_\w+ = (\d+)", text)}
    assert reasons == set(micro.REFUSALS)
    flags = {name: 1 << int(bit) for name, bit in re.findall(r"(FLAG_\w+) = 1 << (\d+)", text)}
    assert flags == {name: getattr(micro, name) for name in flags}
    assert len(flags) == 3
    assert f"{micro.PARAMETERS_MAGIC:#x}" in text


def test_both_guests_are_made_again_when_what_they_share_changes() -> None:
    shared = {"layout.h", "mix.h", "writers.h"}
    assert shared <= {path.name for path in micro._HEADERS}
    assert shared <= {path.name for path in initramfs._HEADERS}


@given(
    st.sampled_from([kind for kind in protocol.KINDS if kind != "allocate"]),
    st.integers(1, 4),
    st.sampled_from(["tcg", "kvm"]),
    st.sampled_from([4, 2048]),
)
def test_the_guest_is_told_what_was_asked_for(
    kind: WorkloadKind, threads: int, accel: Accel, page_kib: int
) -> None:
    machine = Machine(ram_mib=64, vcpus=4, guest="micro", accel=accel)
    workload = Workload(kind, wss_mib=16, threads=threads, seed=9, page_kib=page_kib)
    check_fit(machine, workload)
    rom = bytes(range(256)) * 256
    told = micro.rom_for(rom, machine, workload)
    at = micro.PARAMETERS_ADDRESS - micro.ROM_ADDRESS
    words = struct.unpack_from("<9Q", told, at)
    assert words[:7] == (
        micro.PARAMETERS_MAGIC,
        protocol.KINDS.index(kind),
        16,
        1 if kind == "idle" else threads,
        9,
        0,
        64,
    )
    assert bool(words[7] & micro.FLAG_HUGE_PAGES) == (page_kib == 2048)
    assert bool(words[7] & micro.FLAG_WARM_UP) == (accel == "tcg")
    # Nothing else is changed.
    assert (told[:at], told[at + 72 :]) == (rom[:at], rom[at + 72 :])


def test_a_rom_of_another_size_is_refused() -> None:
    with pytest.raises(GuestError, match="100 bytes"):
        micro.rom_for(bytes(100), Machine(guest="micro"), Workload(wss_mib=1))


@pytest.mark.parametrize(
    ("machine", "workload", "said"),
    [
        (Machine(guest="micro", ram_mib=64), Workload("allocate", wss_mib=8), "no kernel"),
        (Machine(guest="micro", ram_mib=64), Workload(wss_mib=8, threads=2), "2 writers"),
        (Machine(guest="micro", ram_mib=64), Workload(wss_mib=60), "does not fit"),
        (Machine(guest="micro", ram_mib=64), Workload("idle", wss_mib=60), "does not fit"),
        (Machine(), Workload(page_kib=2048), "pages of 4 KiB"),
    ],
)
def test_what_a_guest_can_not_do_is_refused_before_it_boots(
    machine: Machine, workload: Workload, said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        check_fit(machine, workload)
    assert caught.value.remedy


@pytest.mark.parametrize("device", [{"disk": "ide"}, {"net": True}, {"vnc": True}])
def test_the_microguest_has_no_devices(device: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"no driver for {next(iter(device))}"):
        Machine(guest="micro", **device)  # type: ignore[arg-type]  # any of several types


def test_pages_of_other_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="page_kib is 8"):
        Workload(page_kib=8)
