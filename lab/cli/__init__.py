"""The commands of ``lab``, one module each; `recording` is what some of them share.

A command module has ``register(subparsers)``, which adds its parser by ``add_command``, with a
handler: a function ``(args) -> int`` or ``async (args) -> int``. Modules import what is heavy
inside the handler, so that ``lab --help`` is quick.
"""

import argparse
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeAlias

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Handler = Callable[[argparse.Namespace], Awaitable[int] | int]


class _Formatter(argparse.HelpFormatter):
    """Wraps paragraphs, and leaves alone what has lines already: examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def add_command(
    subparsers: Subparsers,
    name: str,
    handler: Handler,
    *,
    summary: str,
    description: str,
    epilog: str | None = None,
    usage: str | None = None,
) -> argparse.ArgumentParser:
    """Return the parser of a new command.

    :param summary: what `lab --help` says about it.
    :param description: what its own help says.
    :param epilog: examples, shown as they are.
    :param usage: in place of the list of all flags, where that is long.
    """
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        usage=usage,
        formatter_class=_Formatter,
    )
    parser.set_defaults(handler=handler)
    return parser


@contextlib.contextmanager
def setting(name: str, value: str) -> Iterator[None]:
    """Have an environment variable be that while the context lasts."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
