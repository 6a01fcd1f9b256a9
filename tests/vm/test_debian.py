"""The lab's Debian boots, serves what experiments ask of it, lets its user in, and its disk in the
cache is never written to.
"""

import asyncio
import dataclasses
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from lab.errors import GuestError, HostError
from lab.guests.debian.build import DebianDisk, ensure_debian
from lab.guests.debian.shell import in_guest, wait_for_ssh
from lab.qemu.build import find_qemu

pytestmark = [
    pytest.mark.vm,
    pytest.mark.thorough,
    pytest.mark.platforms("tcg"),
    # The first of these tests downloads and builds it.
    pytest.mark.timeout(3600),
]

READY_S = 600.0
"""Far more than it takes: a guest under TCG on a host that is busy with other things."""
PORTS = {"ssh": 22, "redis": 6379, "postgres": 5432}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guest:
    """A guest of Debian's, booted by QEMU's command line alone."""

    debian: DebianDisk
    process: subprocess.Popen[bytes]
    ports: dict[str, int]
    console: Path

    async def run(self, command: str) -> str:
        """Return what a command of root's writes."""
        return await in_guest(self.ports["ssh"], self.debian.key, command, timeout_s=READY_S)

    async def ask(self, service: str, request: bytes, end: bytes) -> bytes:
        """Return what a service answers, up to and with `end`."""
        async with asyncio.timeout(READY_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.ports[service])
            writer.write(request)
            answer = await reader.readuntil(end)
            writer.close()
            await writer.wait_closed()
        return answer


def state(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_blocks


@pytest.fixture(scope="module")
def debian() -> DebianDisk:
    try:
        return asyncio.run(ensure_debian())
    except HostError as error:
        pytest.skip(f"Debian cannot be built here: {error}")


@pytest.fixture(scope="module")
def guest(
    debian: DebianDisk,
    tmp_path_factory: pytest.TempPathFactory,
    unused_tcp_port_factory: Callable[[], int],
) -> Iterator[Guest]:
    """A guest that root can log in to; whatever is left of it ends with the tests."""
    qemu = find_qemu("patched").path
    folder = tmp_path_factory.mktemp("debian")
    overlay, console = folder / "overlay.qcow2", folder / "console"
    create = [str(qemu.with_name("qemu-img")), "create", "-q", "-f", "qcow2", "-F", "raw"]
    subprocess.run([*create, "-b", str(debian.disk), str(overlay)], check=True)
    before = state(debian.disk)
    ports = {service: unused_tcp_port_factory() for service in PORTS}
    forwards = [f"hostfwd=tcp:127.0.0.1:{ports[name]}-:{port}" for name, port in PORTS.items()]
    command = [
        *(str(qemu), "-M", "q35", "-accel", "tcg", "-smp", "2", "-m", "1024", "-nodefaults"),
        *("-display", "none", "-no-reboot", "-serial", "stdio"),
        *("-kernel", str(debian.kernel), "-initrd", str(debian.initrd), "-append", debian.append),
        *("-drive", f"if=virtio,format=qcow2,file={overlay}"),
        *("-netdev", ",".join(("user", "id=net", *forwards))),
        *("-device", "virtio-net-pci,netdev=net"),
    ]
    with (
        console.open("wb") as output,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output) as process,
    ):
        try:
            asyncio.run(wait_for_ssh(ports["ssh"], debian.key, READY_S))
            yield Guest(debian=debian, process=process, ports=ports, console=console)
        finally:
            process.kill()
    assert state(debian.disk) == before, "the disk in the cache was written to"
    overlay.unlink()


async def test_every_unit_of_systemd_is_up(guest: Guest) -> None:
    # It fails when the state is another one.
    assert await guest.run("systemctl is-system-running --wait") == "running\n"
    assert await guest.run("systemctl --failed --no-legend") == ""


async def test_redis_answers_at_its_port_and_keeps_nothing_on_its_disk(guest: Guest) -> None:
    assert await guest.ask("redis", b"PING\r\n", b"\r\n") == b"+PONG\r\n"
    for name, end in (("save", b"$0\r\n\r\n"), ("appendonly", b"$2\r\nno\r\n")):
        answer = await guest.ask("redis", f"CONFIG GET {name}\r\n".encode(), end)
        assert answer.split() == [b"*2", b"$%d" % len(name), name.encode(), *end.split()]


async def test_postgresql_answers_a_query_of_the_lab_s_superuser_without_a_password(
    guest: Guest,
) -> None:
    def message(kind: bytes, content: bytes) -> bytes:
        return kind + (len(content) + 4).to_bytes(4, "big") + content

    hello = (3 << 16).to_bytes(4, "big") + b"user\0lab\0database\0lab\0\0"
    query = b"SELECT 'is ' || rolsuper FROM pg_roles WHERE rolname = current_user\0"

    answer = await guest.ask("postgres", message(b"", hello) + message(b"Q", query), b"SELECT 1\0")

    assert b"is true" in answer


async def test_what_experiments_run_in_it_is_there(guest: Guest) -> None:
    assert await guest.run("sqlite3 /tmp/x.db 'PRAGMA journal_mode = wal'") == "wal\n"
    compiled = "cd /tmp && echo 'int main(void) { return 7; }' >a.c && make -s a; ./a; echo $?"
    assert await guest.run(compiled) == "7\n"
    assert (await guest.run("fio --version")).startswith("fio-")
    assert (await guest.run("redis-benchmark --version")).startswith("redis-benchmark")
    assert (await guest.run("pgbench --version")).startswith("pgbench")
    assert await guest.run("findmnt -no LABEL,FSTYPE /") == "lab-debian ext4\n"


async def test_it_has_nothing_of_the_host_that_built_it(guest: Guest) -> None:
    assert await guest.run("cat /etc/hostname") == "lab-debian\n"
    sources = await guest.run("cat /etc/apt/sources.list; ls /etc/apt/sources.list.d")
    assert all(line.startswith("#") for line in sources.splitlines())
    assert (
        await guest.run("grep -v ' lab$\\| lab-debian$' /root/.ssh/authorized_keys || true") == ""
    )
    node = os.uname().nodename
    found = await guest.run(f"grep -rIlw --fixed-strings {node} /etc /var/lib /var/log || true")
    assert found == "" or len(node) < 4


async def test_root_is_logged_in_on_the_serial_console(guest: Guest) -> None:
    stdin: IO[bytes] | None = guest.process.stdin
    assert stdin is not None
    stdin.write(b"echo $(id -un)-$((6 * 7))\n")
    stdin.flush()
    end = time.monotonic() + READY_S
    while b"root-42" not in guest.console.read_bytes():
        assert time.monotonic() < end, guest.console.read_text(errors="replace")[-500:]
        await asyncio.sleep(0.1)


async def test_another_key_does_not_let_anybody_in(guest: Guest, tmp_path: Path) -> None:
    key = tmp_path / "key"
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)]
    process = await asyncio.create_subprocess_exec(*command)
    assert await process.wait() == 0

    with pytest.raises(GuestError, match="refuses the key"):
        await in_guest(guest.ports["ssh"], key, "true", timeout_s=READY_S)


async def test_it_shuts_down(guest: Guest) -> None:
    await guest.run("systemctl poweroff --no-block")
    end = time.monotonic() + READY_S
    while guest.process.poll() is None:
        assert time.monotonic() < end, guest.console.read_text(errors="replace")[-500:]
        await asyncio.sleep(0.1)
    assert guest.process.returncode == 0
