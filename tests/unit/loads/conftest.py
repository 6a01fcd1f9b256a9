"""Real servers on free ports of this host, each in a folder of its own, ended with the test."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

START_S = 30.0


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextlib.contextmanager
def running_server(
    command: list[str],
    port: int,
    folder: Path,
    user: str | None = None,
    end: signal.Signals = signal.SIGTERM,
    ready: str = "",
) -> Iterator[int]:
    """Run a server until the context is left, and give its process id once `port` answers.

    :param ready: what is in its log when it lets anybody in.
    :param end: the signal at which it ends and does not wait for its clients.
    """
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            user=user,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_S
        while ready not in (folder / "server.log").read_text():
            assert process.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.02)
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.socket() as sock:
                sock.connect(("127.0.0.1", port))
                break
            assert process.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.02)
        yield process.pid
    finally:
        # One that a test has stopped would not end before it goes on.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)
        process.send_signal(end)
        try:
            process.wait(10)
        finally:
            process.kill()
            process.wait()


def wait_state(pid: int, wanted: str) -> None:
    """Wait until a process is in a state, as procfs names it: T stopped, S waiting for something.

    :raise AssertionError: it never was.
    """
    deadline = time.monotonic() + START_S
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != wanted:
        assert time.monotonic() < deadline, f"process {pid} is not in state {wanted}"
        time.sleep(0.001)


@contextlib.contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Have the kernel run nothing of these processes meanwhile."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        for pid in pids:
            wait_state(pid, "T")
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


class Server(NamedTuple):
    """A server that runs: its port and its process id."""

    port: int
    pid: int


def _redis_command(folder: Path) -> list[str]:
    if found := shutil.which("redis-server"):
        return [found]
    # Debian's redis-tools has the server under another name, and does not start it as a service.
    if found := shutil.which("redis-check-rdb"):
        (folder / "redis-server").symlink_to(found)
        return [str(folder / "redis-server")]
    pytest.skip("no redis-server: install redis-tools")


@pytest.fixture
def redis_options() -> list[str]:
    """What the server of `redis` is started with besides; tests override it."""
    return []


@pytest.fixture
def redis(tmp_path: Path, redis_options: list[str]) -> Iterator[Server]:
    """A Redis that keeps nothing on disk."""
    port = free_port()
    command = [*_redis_command(tmp_path), "--port", str(port), "--bind", "127.0.0.1"]
    with running_server([*command, "--save", "", *redis_options], port, tmp_path) as pid:
        yield Server(port, pid)


Ask = Callable[..., bytes]


@pytest.fixture
def ask(redis: Server) -> Iterator[Ask]:
    """Ask that Redis something, and get what it answers, as bytes."""
    with socket.create_connection(("127.0.0.1", redis.port), timeout=20) as sock:
        file = sock.makefile("rb")

        def send(*words: str) -> bytes:
            parts = [f"${len(word.encode())}\r\n{word}\r\n" for word in words]
            sock.sendall(f"*{len(words)}\r\n{''.join(parts)}".encode())
            line = file.readline()
            if not line.startswith(b"$") or line == b"$-1\r\n":
                return line.strip()
            return file.read(int(line[1:]) + 2)[:-2]

        yield send
        file.close()


def _postgres_programs() -> Path:
    """The folder with PostgreSQL's server programs, of the newest version."""
    found = list(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("no PostgreSQL server: install postgresql")
    return max(found, key=lambda path: float(path.parts[-3])).parent


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A PostgreSQL that lets anybody of this host in and waits for no disk."""
    programs = _postgres_programs()
    # It refuses to run as root.
    user = "nobody" if os.geteuid() == 0 else None
    # Among temporary files that another user may reach.
    with tempfile.TemporaryDirectory(prefix="lab-test-postgres-") as name:
        folder = Path(name)
        if user:
            shutil.chown(folder, user)
        data = folder / "data"
        subprocess.run(
            [
                programs / "initdb",
                "--no-sync",
                "--auth=trust",
                "--username=postgres",
                "--encoding=UTF8",
                "--locale=C",
                data,
            ],
            check=True,
            capture_output=True,
            cwd=folder,
            user=user,
        )
        port = free_port()
        options = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "off",
            "shared_buffers": "16MB",
            "max_connections": "20",
        }
        command = [str(programs / "postgres"), "-D", str(data), "-p", str(port)]
        command += [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
        ready = "ready to accept connections"
        with running_server(command, port, folder, user, signal.SIGINT, ready) as pid:
            yield Server(port, pid)
