"""Commands in the lab's Debian, by ssh."""

import asyncio
import subprocess
from pathlib import Path

from lab.errors import GuestError, GuestSilentError, HostError

_POLL_S = 0.5
_CONNECT_S = 30


async def wait_for_ssh(port: int, key: Path, timeout_s: float) -> None:
    """Wait until the guest lets one in.

    :param port: of this host's loopback, which leads to the guest's ssh.
    :raise GuestSilentError: when it does not in time.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout_s
    said = "nothing"
    while loop.time() < end:
        done = await _ssh(port, key, "true", timeout_s=max(end - loop.time(), 1.0))
        if done.returncode == 0:
            return
        said = _last_line(done.stderr) or said
        await asyncio.sleep(_POLL_S)
    raise GuestSilentError(
        f"the guest let nobody in by ssh within {timeout_s:g} s: {said}",
        "give it more time, or look at its console",
    )


async def in_guest(port: int, key: Path, command: str, *, timeout_s: float) -> str:
    """Run a command as root, and return what it prints.

    :raise GuestError: when it fails; with the last line that it wrote to stderr.
    :raise GuestSilentError: when it does not end in time.
    """
    done = await _ssh(port, key, command, timeout_s=timeout_s)
    if done.returncode is None:
        raise GuestSilentError(
            f"the guest did not end {command!r} within {timeout_s:g} s", "give it more time"
        )
    if done.returncode:
        raise GuestError(
            f"{command!r} ended with {done.returncode} in the guest: {_last_line(done.stderr)}",
            "look at its console, or try the command by hand",
        )
    return done.stdout.decode(errors="replace")


def _last_line(text: bytes) -> str:
    lines = [line.strip() for line in text.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


class _Done:
    def __init__(self, returncode: int | None, stdout: bytes, stderr: bytes) -> None:
        self.returncode = returncode
        """None: it did not end in time."""
        self.stdout = stdout
        self.stderr = stderr


async def _ssh(port: int, key: Path, command: str, *, timeout_s: float) -> _Done:
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": str(_CONNECT_S),
        "IdentitiesOnly": "yes",
        "LogLevel": "ERROR",
        # A guest that is restored is another one on another port, with the same key.
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": "/dev/null",
        "GlobalKnownHostsFile": "/dev/null",
    }
    arguments = ["-F", "none", "-i", str(key), "-p", str(port)]
    for name, value in options.items():
        arguments += ["-o", f"{name}={value}"]
    try:
        process = await asyncio.create_subprocess_exec(
            *("ssh", *arguments, "root@127.0.0.1", command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    except FileNotFoundError as error:
        raise HostError("there is no ssh on this host", "install openssh-client") from error
    try:
        async with asyncio.timeout(timeout_s):
            stdout, stderr = await process.communicate()
        return _Done(process.returncode, stdout, stderr)
    except TimeoutError:
        return _Done(None, b"", b"")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
