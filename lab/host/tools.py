"""Run other people's tools: with a log, interruptible, and leaving nothing behind."""

import asyncio
import codecs
import contextlib
import os
import shlex
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

from lab.errors import BuildError, HostError

_TERMINATE_GRACE_S = 5.0


def require_tools(names: Sequence[str]) -> None:
    """Check that programs are on the PATH.

    :raise HostError: naming what is missing and the set-up routine.
    """
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        raise HostError(f"missing programs: {' '.join(missing)}", "run `sh lab/bootstrap.sh`")


def find_compiler(names: Sequence[str], what: str, remedy: str) -> str:
    """Return the path of the first of these C compilers that is there.

    :raise HostError: when none is.
    """
    for name in names:
        if path := shutil.which(name):
            return path
    raise HostError(f"no C compiler for {what}", remedy)


def log_tail(log: Path, lines: int = 3) -> str:
    """The last lines of a log that are not empty, joined to one line."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return ""
    kept = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(kept[-lines:])


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Whole lines of any length; `readline` would refuse a compiler's longest ones."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest = ""
    while chunk := await stream.read(65536):
        *whole, rest = (rest + decoder.decode(chunk)).split("\n")
        for line in whole:
            yield line
    if rest:
        yield rest


def _signal_group(leader: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, number)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Stop a tool and everything it started."""
    _signal_group(process.pid, signal.SIGTERM)
    try:
        async with asyncio.timeout(_TERMINATE_GRACE_S):
            await process.wait()
    except TimeoutError:
        pass
    finally:
        # The leader may be gone while its children still run.
        _signal_group(process.pid, signal.SIGKILL)
    await process.wait()


async def run_tool(
    command: Sequence[str | Path],
    *,
    log: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
    accept: Sequence[int] = (0,),
) -> list[str]:
    """Run a tool to its end and return what it wrote, stdout and stderr together.

    It gets a session of its own, so that an interrupt at the terminal reaches the lab alone; when
    this coroutine is cancelled the tool and its children are stopped before it returns.

    :param log: command and output are appended here.
    :param env: replaces the environment when given.
    :param on_line: called with every line as it comes.
    :param accept: exit statuses that are no failure.
    :raise HostError: when the tool is not there.
    :raise BuildError: when it fails; names the log and its last lines.
    """
    arguments = [str(part) for part in command]
    require_tools([arguments[0]])
    wrapped = arguments
    if shutil.which("setpriv"):
        # Should the lab be killed outright, a build must not go on without it.
        wrapped = ["setpriv", "--pdeathsig=TERM", "--", *arguments]
    output: list[str] = []
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as sink:
        sink.write(f"+ {shlex.join(arguments)}\n")
        sink.flush()
        process = await asyncio.create_subprocess_exec(
            *wrapped,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=cwd,
            env=env,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            async for line in _lines(process.stdout):
                sink.write(line + "\n")
                output.append(line)
                if on_line is not None:
                    on_line(line)
            status = await process.wait()
        finally:
            if process.returncode is None:
                await _end(process)
    if status not in accept:
        name = Path(arguments[0]).name
        tail = log_tail(log)
        raise BuildError(f"{name} failed with status {status}: {tail}", f"the whole log: {log}")
    return output
