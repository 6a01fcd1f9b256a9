"""Run commands in a guest of the lab's Debian, by the system's ssh and a forwarded port.

Nothing of the user's own ssh takes part: neither his configuration, nor his agent, nor his list of
known hosts.  The port is on this host's loopback, so there is nobody in between to be known.
"""

import asyncio
import contextlib
import shutil
import time
from pathlib import Path

from lab.errors import GuestError, GuestSilentError, HostError, TransientError

_OPTIONS = {
    "BatchMode": "yes",
    "IdentitiesOnly": "yes",
    "IdentityAgent": "none",
    "StrictHostKeyChecking": "no",
    "UserKnownHostsFile": "/dev/null",
    "GlobalKnownHostsFile": "/dev/null",
    "ControlPath": "none",
    "LogLevel": "ERROR",
}
_FAILED_ITSELF = 255
"""Exit status of ssh that says nothing of the command."""
_ATTEMPT_S = 20.0
"""Time for a connection to a guest that may still boot; under TCG the keys alone take seconds."""
_PAUSE_S = 0.5


def ssh_command(port: int, key: Path, command: str, connect_s: float) -> list[str]:
    """Return what runs a command of a shell in the guest as root.

    :param connect_s: how long connecting may take, rounded up to seconds.
    """
    options = {**_OPTIONS, "ConnectTimeout": str(max(1, -int(-connect_s // 1)))}
    return [
        *("ssh", "-F", "none", "-T", "-i", str(key), "-p", str(port)),
        *(part for name, value in options.items() for part in ("-o", f"{name}={value}")),
        *("root@127.0.0.1", "--", command),
    ]


async def in_guest(port: int, key: Path, command: str, *, timeout_s: float) -> str:
    """Run a command in the guest's shell as root, and return what it wrote to stdout.

    Nothing is given to it on stdin.

    :param port: of this host, forwarded to the guest's port 22.
    :param key: `DebianDisk.key`.
    :param timeout_s: for connecting and for the command together.
    :raise HostError: when there is no ssh on this host.
    :raise TransientError: when the guest does not answer.
    :raise GuestSilentError: when the command takes longer; in the guest it may go on.
    :raise GuestError: when the command fails, or the guest refuses the key.
    """
    return await _run(port, key, command, timeout_s, connect_s=timeout_s)


def require_ssh() -> None:
    """Refuse a host from which nobody can log in to a guest.

    :raise HostError: it has no ssh.
    """
    if shutil.which("ssh") is None:
        raise HostError("no ssh on this host", "install the Debian package openssh-client")


async def wait_for_ssh(port: int, key: Path, timeout_s: float) -> None:
    """Wait until root can log in to a guest that boots.

    :raise HostError: when there is no ssh on this host.
    :raise GuestSilentError: when it does not answer in time; says what ssh said last.
    :raise GuestError: when it refuses the key.
    """
    deadline = time.monotonic() + timeout_s
    last = "nothing"
    while (left_s := deadline - time.monotonic()) > 0:
        try:
            await _run(port, key, "true", left_s, connect_s=min(_ATTEMPT_S, left_s))
            return
        except GuestSilentError:
            break
        except TransientError as error:
            last = error.cause
        await asyncio.sleep(_PAUSE_S)
    raise GuestSilentError(
        f"nobody could log in to the guest on port {port} within {timeout_s:g} s; last: {last}",
        "look at the guest's serial console, and see that the port is forwarded to its port 22",
    )


async def _run(port: int, key: Path, command: str, timeout_s: float, connect_s: float) -> str:
    require_ssh()
    process = await asyncio.create_subprocess_exec(
        *ssh_command(port, key, command, connect_s),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # An interrupt at the terminal is the lab's alone.
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(timeout_s):
            stdout, stderr = await process.communicate()
    except TimeoutError:
        raise GuestSilentError(
            f"`{command}` took longer than {timeout_s:g} s in the guest on port {port}",
            "give it more time",
        ) from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode != 0:
        assert process.returncode is not None
        raise _failure(port, command, process.returncode, stderr.decode(errors="replace"))
    return stdout.decode(errors="replace")


def _failure(port: int, command: str, status: int, said: str) -> GuestError | TransientError:
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "no reason given")
    if status != _FAILED_ITSELF:
        return GuestError(f"`{command}` failed with status {status} in the guest: {last}")
    if "Permission denied" in last:
        return GuestError(
            f"the guest on port {port} refuses the key: {last}",
            "use the key of the Debian from which it booted, find_debian().key",
        )
    return TransientError(
        f"no ssh with the guest on port {port}: {last}",
        "see that it has booted, and that the port is forwarded to its port 22",
    )
