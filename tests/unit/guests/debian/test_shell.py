"""What ssh says becomes an error with cause and remedy, and nothing of the user's takes part."""

import asyncio
import shutil
from pathlib import Path

import psutil
import pytest

from lab.errors import GuestError, GuestSilentError, HostError, TransientError
from lab.guests.debian.shell import in_guest, ssh_command, wait_for_ssh


def test_ssh_asks_nobody_and_reads_and_writes_nothing_of_the_users() -> None:
    command = ssh_command(2222, Path("/cache/key"), "uname -r; true", 2.5)

    assert command[:3] == ["ssh", "-F", "none"]
    assert command[-3:] == ["root@127.0.0.1", "--", "uname -r; true"]
    assert {"BatchMode=yes", "IdentityAgent=none", "ConnectTimeout=3"} <= set(command)
    assert {"UserKnownHostsFile=/dev/null", "GlobalKnownHostsFile=/dev/null"} <= set(command)


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for ssh; it is silent, and says that all went well."""
    path = tmp_path / "tools" / "ssh"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent), prepend=":")
    return path


async def test_what_a_command_writes_is_returned(ssh: Path) -> None:
    ssh.write_text("#!/bin/sh\necho said; echo aside >&2; read -r line || echo nothing to read\n")

    assert await in_guest(1, Path("key"), "x", timeout_s=60) == "said\nnothing to read\n"


async def test_a_command_that_fails_is_named_with_its_last_words(ssh: Path) -> None:
    ssh.write_text("#!/bin/sh\necho first >&2; echo 'no such table' >&2; exit 3\n")

    with pytest.raises(GuestError, match=r"`make x` failed with status 3 in the guest: no such ta"):
        await in_guest(1, Path("key"), "make x", timeout_s=60)


async def test_a_guest_that_refuses_the_key_will_go_on_refusing_it(ssh: Path) -> None:
    ssh.write_text("#!/bin/sh\necho 'root@x: Permission denied (publickey).' >&2; exit 255\n")

    with pytest.raises(GuestError, match="refuses the key"):
        await wait_for_ssh(1, Path("key"), 60)


async def test_a_command_that_takes_too_long_is_ended_on_this_side(
    ssh: Path, tmp_path: Path
) -> None:
    ssh.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid; exec sleep 1000\n")

    with pytest.raises(GuestSilentError, match=r"`x` took longer than 0\.5 s"):
        await in_guest(1, Path("key"), "x", timeout_s=0.5)

    assert not psutil.pid_exists(int((tmp_path / "pid").read_text() or 0))


async def test_no_ssh_on_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(HostError, match="install the Debian package openssh-client"):
        await in_guest(1, Path("key"), "x", timeout_s=1)


@pytest.fixture
def real_ssh() -> None:
    if shutil.which("ssh") is None:
        pytest.skip("no ssh here")


@pytest.mark.usefixtures("real_ssh")
async def test_nobody_listens(unused_tcp_port: int, tmp_path: Path) -> None:
    with pytest.raises(TransientError, match=r"Connection refused; see that it has booted"):
        await in_guest(unused_tcp_port, tmp_path / "key", "x", timeout_s=60)


@pytest.mark.usefixtures("real_ssh")
async def test_waiting_for_nobody_ends_and_says_what_ssh_said(
    unused_tcp_port: int, tmp_path: Path
) -> None:
    with pytest.raises(GuestSilentError, match=r"within 1\.5 s; last: .*Connection refused"):
        await wait_for_ssh(unused_tcp_port, tmp_path / "key", 1.5)


@pytest.mark.usefixtures("real_ssh")
async def test_waiting_for_one_who_accepts_and_says_nothing_ends(tmp_path: Path) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(GuestSilentError, match="serial console"):
            await wait_for_ssh(port, tmp_path / "key", 1.5)
