"""The real guest under TCG: it boots, counts, verifies, and its RAM is what the host replays."""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from lab.guests.linux.guest import LinuxGuest
from lab.guests.protocol import (
    PAGE_BYTES,
    PAGE_MAGIC,
    PAGE_WORDS,
    WORD_INDEX,
    WORD_MAGIC,
    WORD_TAIL,
    ProgressPage,
    ReadyRecord,
    Record,
    check_working_set,
    find_progress_page,
    kernel_command_line,
    parse_record,
)
from lab.qemu.build import find_qemu

pytestmark = [
    pytest.mark.vm,
    pytest.mark.thorough,
    pytest.mark.timeout(300),
    pytest.mark.platforms("tcg"),
]

RAM_MIB = 256


def read_memory(pid: int, address: int) -> bytes:
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        return os.pread(memory.fileno(), PAGE_BYTES, address)


def write_memory(pid: int, address: int, data: bytes) -> None:
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        assert os.pwrite(memory.fileno(), data, address) == len(data)


class Guest:
    """A QEMU with the guest's serial port on its standard streams and a monitor on a socket."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.records: list[Record] = []

    async def next(self, kind: str) -> Record:
        """Read the console until there is a record of this kind."""
        assert self.process.stdout is not None
        async with asyncio.timeout(120):
            while line := await self.process.stdout.readline():
                record = parse_record(line.decode(errors="replace"))
                if record is not None:
                    self.records.append(record)
                    if record.kind == kind:
                        return record
        raise AssertionError(f"the guest ended without {kind}: {self.records}")

    async def ready(self) -> ReadyRecord:
        return ReadyRecord.from_record(await self.next("ready"))

    async def type(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n".encode())
        await self.process.stdin.drain()

    async def monitor(self, *commands: str) -> list[str]:
        """Give commands to the monitor; return what it says to each."""
        reader, writer = await asyncio.open_unix_connection(self.folder / "monitor")
        try:
            async with asyncio.timeout(120):
                await reader.readuntil(b"(qemu) ")
                said = []
                for command in commands:
                    writer.write(f"{command}\n".encode())
                    said.append((await reader.readuntil(b"(qemu) ")).decode())
                return said
        finally:
            writer.close()
            await writer.wait_closed()

    async def host_address(self, gpa: int) -> int:
        (said,) = await self.monitor(f"gpa2hva {gpa:#x}")
        return int(said.split(" is ")[1].split()[0], 16)

    async def progress(self, ready: ReadyRecord) -> ProgressPage:
        """Read the progress page from this process, without the guest's knowledge."""
        address = await self.host_address(ready.progress_gpa)
        return ProgressPage.decode(read_memory(self.process.pid, address))

    async def until_beyond(self, ready: ReadyRecord, ops: int) -> None:
        """Wait until the guest has done more than so many operations."""
        async with asyncio.timeout(60):
            # A page of RAM has no event to wait for.
            while (await self.progress(ready)).total_ops <= ops:
                await asyncio.sleep(0.01)

    async def dump(self) -> np.memmap[tuple[int], np.dtype[np.uint8]]:
        """Stop the VM and dump its RAM; the VM stays stopped."""
        path = self.folder / "ram"
        await self.monitor("stop", f'pmemsave 0 {RAM_MIB << 20:#x} "{path}"')
        return np.memmap(path, dtype=np.uint8, mode="r")


@asynccontextmanager
async def booted(
    folder: Path,
    *,
    kind: str = "random",
    wss_mib: int = 64,
    threads: int = 1,
    vcpus: int = 1,
    ram_mib: int = RAM_MIB,
    machine: str = "pc",
    extra: Sequence[str] = (),
    append: str | None = None,
) -> AsyncIterator[Guest]:
    files = await LinuxGuest().ensure()
    line = append or kernel_command_line(kind=kind, wss_mib=wss_mib, threads=threads, seed=11)
    monitor = f"unix:{folder / 'monitor'},server=on,wait=off"
    process = await asyncio.create_subprocess_exec(
        find_qemu("unpatched").path,
        *("-machine", machine, "-accel", "tcg", "-m", str(ram_mib), "-smp", str(vcpus)),
        *("-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"),
        *("-monitor", monitor, "-kernel", files.kernel, "-initrd", files.initramfs),
        *("-append", line, *extra),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield Guest(process, folder)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def exit_status(guest: Guest) -> int:
    async with asyncio.timeout(60):
        return await guest.process.wait()


async def test_the_guest_says_what_it_runs_and_powers_off_when_told(tmp_path: Path) -> None:
    async with booted(tmp_path) as guest:
        ready = await guest.ready()
        assert [record.kind for record in guest.records] == ["hello", "params", "ready"]
        assert (ready.wss_pages, ready.threads, ready.seed, ready.kind) == (
            64 << 8, 1, 11, "random"
        )  # fmt: skip
        await guest.type("poweroff")
        bye = await guest.next("bye")
        assert int(bye.fields["ops"]) > 0
        assert bye.fields["errors"] == "0"
        assert await exit_status(guest) == 0


@pytest.mark.parametrize(
    ("kind", "threads", "vcpus"),
    [
        ("random", 1, 1),
        ("random", 2, 2),
        ("sequential", 1, 1),
        ("random", 3, 1),
        ("scattered", 2, 2),
        ("zipf", 2, 2),
        ("hotcold", 1, 1),
        ("readmostly", 2, 2),
        ("idle", 1, 1),
    ],
)
async def test_ram_at_any_instant_is_what_the_host_replays(
    tmp_path: Path, kind: str, threads: int, vcpus: int
) -> None:
    async with booted(tmp_path, kind=kind, threads=threads, vcpus=vcpus) as guest:
        ready = await guest.ready()
        before = await guest.progress(ready)
        ram = await guest.dump()
        progress = find_progress_page([ram], ready.nonce)
        assert progress.state == "running"
        assert progress.page_errors == 0
        assert all(old <= new for old, new in zip(before.ops, progress.ops, strict=True))
        assert progress == await guest.progress(ready)
        check = check_working_set([ram], progress)
        assert check.ok, check
        assert check.in_flight <= threads


async def test_the_counter_moves_while_the_vm_runs_and_stands_while_it_is_stopped(
    tmp_path: Path,
) -> None:
    async with booted(tmp_path) as guest:
        ready = await guest.ready()
        start = await guest.progress(ready)
        await guest.until_beyond(ready, start.total_ops + 100_000)
        await guest.monitor("stop")
        stopped = await guest.progress(ready)
        await asyncio.sleep(0.1)
        assert await guest.progress(ready) == stopped


async def test_the_writers_go_on_after_a_full_verification(tmp_path: Path) -> None:
    async with booted(tmp_path, threads=2, vcpus=2) as guest:
        ready = await guest.ready()
        for _ in range(2):
            await guest.type("verify")
            verified = await guest.next("verify")
            assert int(verified.fields["pages"]) == ready.wss_pages
            assert (verified.fields["bad"], verified.fields["errors"]) == ("0", "0")
            done = int(verified.fields["ops"])
            await guest.until_beyond(ready, done)


async def test_one_stale_word_is_found_by_the_writer_and_by_the_host(tmp_path: Path) -> None:
    async with booted(tmp_path) as guest:
        ready = await guest.ready()
        ram = await guest.dump()
        rows = ram.view("<u8").reshape(-1, PAGE_WORDS)
        hits = np.flatnonzero(rows[:, WORD_MAGIC] == PAGE_MAGIC ^ ready.nonce)
        frame = int(hits[len(hits) // 2])
        index = int(rows[frame, WORD_INDEX])
        address = await guest.host_address(frame * PAGE_BYTES)
        write_memory(guest.process.pid, address + 8 * WORD_TAIL, bytes(8))
        del rows, ram
        ram = await guest.dump()
        check = check_working_set([ram], find_progress_page([ram], ready.nonce))
        assert (check.wrong, check.first_wrong) == (1, (index,))
        await guest.monitor("cont")
        error = await guest.next("error")
        assert error.fields["what"] == "page"
        assert int(error.fields["page"]) == index
        assert error.fields["tail"] == "0"
        assert (await guest.progress(ready)).page_errors == 1


async def test_two_boots_have_two_nonces(tmp_path: Path) -> None:
    nonces = []
    for _ in range(2):
        async with booted(tmp_path, kind="idle", wss_mib=0) as guest:
            nonces.append((await guest.ready()).nonce)
    assert nonces[0] != nonces[1]


@pytest.mark.parametrize(
    ("parameter", "name"),
    [
        ("lab.threads=63", "lab.threads"),
        ("lab.workload=busy", "lab.workload"),
        ("lab.seed=-1", "lab.seed"),
        ("lab.time_writes=2", "lab.time_writes"),
        ("lab.workload=random lab.wss_mib=1 lab.rate=1000000001", "lab.rate"),
        ("lab.workload=idle lab.rate=1", "lab.rate"),
        ("lab.unheard=1", "lab.unheard"),
        ("lab.workload=random lab.wss_mib=0", "lab.wss_mib"),
    ],
)
async def test_a_bad_parameter_is_named_and_the_guest_powers_off(
    tmp_path: Path, parameter: str, name: str
) -> None:
    async with booted(tmp_path, append=f"console=ttyS0 quiet panic=-1 {parameter}") as guest:
        error = await guest.next("error")
        assert (error.fields["what"], error.fields["name"]) == ("parameter", name)
        assert await exit_status(guest) == 0


async def test_a_working_set_larger_than_memory_is_refused(tmp_path: Path) -> None:
    async with booted(tmp_path, wss_mib=RAM_MIB) as guest:
        error = await guest.next("error")
        assert error.fields["what"] == "memory"
        assert int(error.fields["need_mib"]) > int(error.fields["free_mib"])
        assert await exit_status(guest) == 0


async def test_the_guest_boots_on_the_machine_of_the_rfc(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(16 << 20)
    async with booted(
        tmp_path,
        machine="pc-i440fx-2.5",
        ram_mib=8192,
        extra=(
            *("-drive", f"file={disk},format=raw,if=ide", "-device", "VGA"),
            *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net"),
        ),
    ) as guest:
        ready = await guest.ready()
        # The page is above the hole below 4 GiB, and the monitor still finds it.
        assert (await guest.progress(ready)).nonce == ready.nonce
