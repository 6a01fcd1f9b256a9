"""What a command line has on the host beside its disks: consoles, monitors, displays, logs.

Each gets a UNIX socket or a file in a private folder instead, so that a second QEMU neither takes
it from the first nor writes over what that has written.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from lab.errors import UsageError
from lab.vm.argv.options import (
    IMPLIED,
    Option,
    Pairs,
    Tree,
    first,
    format_json,
    format_pairs,
    is_json,
    is_on,
    parse_json,
    parse_pairs,
    without,
)

_SOCKET_PATH_BYTES = 108
"""What the kernel has room for in the address of a UNIX socket, with the null byte at its end."""

_OUTSIDE = frozenset(
    ("socket", "udp", "pty", "pipe", "stdio", "serial", "tty", "parallel", "parport")
)
"""Kinds of character device that are two-way and lead out of QEMU."""

_LEGACY_INSIDE = ("null", "none", "vc", "chardev", "msmouse", "wctablet", "braille", "con", "")

_KEPT_OF_CHARDEV = ("id", "mux", "logappend")

_KEPT_OF_VNC = frozenset(
    (
        *("id", "share", "lossy", "non-adaptive", "key-delay-ms", "audiodev", "power-control"),
        *("lock-key-sync", "display", "head", "connections"),
    )
)

_DROPPED_OF_SPICE = frozenset(
    (
        *("port", "tls-port", "addr", "ipv4", "ipv6", "unix", "password", "password-secret"),
        *("sasl", "disable-ticketing", "tls-ciphers", "tls-channel", "plaintext-channel"),
        *("x509-dir", "x509-key-file", "x509-key-password", "x509-cert-file"),
        *("x509-cacert-file", "x509-dh-key-file", "seamless-migration"),
    )
)

_CONSOLES = ("serial", "parallel", "monitor", "qmp", "qmp-pretty", "debugcon", "gdb", "qtest")
"""Options whose value is where a console leads, in the old way of writing that."""


class Channels:
    """Gives every channel of a line its place in a folder, and remembers which."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count: dict[str, int] = {}
        self.moved: dict[str, Path] = {}

    def moved_option(self, option: Option) -> tuple[str, ...]:
        """Return the words of an option with its channels in the folder."""
        name, value = option.name, option.value or ""
        if name in _CONSOLES:
            return (f"-{name}", self._console(option, name, value))
        if name == "s":
            return ("-gdb", self._served(option, "gdb"))
        if name == "chardev":
            return ("-chardev", self._chardev(option))
        if name == "vnc":
            return ("-vnc", self._vnc(option, value))
        if name == "spice":
            return ("-spice", self._spice(option, value))
        if name == "display":
            return ("-display", self._display(option, value))
        if name in ("sdl", "curses"):
            return ("-display", "none")
        if name in ("D", "qtest-log"):
            return (f"-{name}", str(self._place(str(option), "log")))
        if name in ("trace", "audiodev", "object", "netdev"):
            return self._written(option)
        return option.words

    def console(self, what: str, kind: str) -> str:
        """Return where a console leads that the line has without naming it."""
        return f"unix:{_escaped(self._socket(what, kind))},server=on,wait=off"

    def _place(self, what: str, kind: str) -> Path:
        number = self._count.get(kind, 0)
        self._count[kind] = number + 1
        path = self._folder / f"{kind}{number}"
        again = 2
        key = what
        while key in self.moved:
            key = f"{what} ({again})"
            again += 1
        self.moved[key] = path
        return path

    def _socket(self, what: str, kind: str) -> Path:
        path = self._place(what, kind)
        if len(os.fsencode(path)) >= _SOCKET_PATH_BYTES:
            raise UsageError(
                f"{path} is too long for a socket, which has to have fewer than "
                f"{_SOCKET_PATH_BYTES} bytes",
                "set TMPDIR to a folder with a shorter path",
            )
        return path

    def _served(self, option: Option, kind: str) -> str:
        return self.console(str(option), kind)

    def _console(self, option: Option, kind: str, value: str) -> str:
        shared = "mon:" if value.startswith("mon:") else ""
        where, _, rest = value.removeprefix("mon:").partition(":")
        if where == "file":
            return f"{shared}file:{self._place(str(option), kind)}"
        # Such a one may have options, too: `vc:80Cx24C`, `null,logfile=x`.
        plain = where.partition(",")[0]
        if plain in _LEGACY_INSIDE and not ("," in where or "logfile=" in rest):
            return value
        return shared + self._served(option, kind)

    def _chardev(self, option: Option) -> str:
        value = option.value or ""
        if is_json(value):
            raise UsageError(
                f"{option} is JSON, which QEMU 10 does not read here",
                "start the machine with `-chardev` as key=value",
            )
        pairs = parse_pairs(value, "backend")
        backend, id_ = first(pairs, "backend"), first(pairs, "id")
        what = f"-chardev {id_}"
        if backend == "file":
            pairs = [(k, str(self._place(what, "file")) if k == "path" else v) for k, v in pairs]
        elif backend in _OUTSIDE:
            kept = [pair for pair in pairs if pair[0] in (*_KEPT_OF_CHARDEV, "logfile")]
            path = self._socket(what, "chardev")
            served = [("path", str(path)), ("server", "on"), ("wait", "off")]
            pairs = [("backend", "socket"), *kept, *served]
        pairs = [
            (k, str(self._place(f"{what} logfile", "log")) if k == "logfile" else v)
            for k, v in pairs
        ]
        return format_pairs(pairs, "backend")

    def _vnc(self, option: Option, value: str) -> str:
        pairs = parse_pairs(value, "vnc")
        if first(pairs, "vnc") in ("none", None):
            return value
        kept = [pair for pair in pairs if pair[0] in _KEPT_OF_VNC]
        path = self._socket(str(option), "vnc")
        return format_pairs([("vnc", f"unix:{path}"), *kept], "vnc")

    def _spice(self, option: Option, value: str) -> str:
        kept = [pair for pair in parse_pairs(value) if pair[0] not in _DROPPED_OF_SPICE]
        path = self._socket(str(option), "spice")
        at = [("unix", "on"), ("addr", str(path)), ("disable-ticketing", "on")]
        return format_pairs([*at, *kept])

    def _display(self, option: Option, value: str) -> str:
        if value.startswith("vnc="):
            return "vnc=" + self._vnc(option, value.removeprefix("vnc="))
        kind = value.partition(",")[0]
        # A window would come up, or the terminal be taken.  Without one a guest draws all the same.
        return value if kind == "egl-headless" else "none"

    def _written(self, option: Option) -> tuple[str, ...]:
        """Files that QEMU begins anew, and addresses that it takes over."""
        value = option.value or ""
        if is_json(value):
            tree = parse_json(option)
            self._write_tree(option, tree)
            return (f"-{option.name}", format_json(tree))
        implied = IMPLIED[option.name]
        pairs = parse_pairs(value, implied)
        changed = dict(self._writes(option, pairs))
        if not changed:
            return option.words
        pairs = [(k, changed.get(k, v)) for k, v in pairs]
        return (f"-{option.name}", format_pairs(pairs, implied))

    def _write_tree(self, option: Option, tree: Tree) -> None:
        flat = [(k, v) for k, v in tree.items() if isinstance(v, str)]
        for branch in ("addr", "local"):
            below = tree.get(branch)
            if isinstance(below, dict):
                flat += [(f"{branch}.{k}", v) for k, v in below.items() if isinstance(v, str)]
        server = is_on(tree.get("server"))
        for key, value in self._writes(option, [*flat, ("server", "on" if server else "off")]):
            branch, _, leaf = key.rpartition(".")
            (tree[branch] if branch else tree)[leaf] = value

    def _writes(self, option: Option, pairs: Pairs) -> Pairs:
        """The keys of an option that name what is written, with their new values."""
        kind = first(pairs, IMPLIED[option.name])
        what = f"-{option.name} {first(pairs, 'id') or kind}"
        has = {key for key, _ in pairs}
        if option.name == "trace" and "file" in has:
            return [("file", str(self._place(f"{what} file", "trace")))]
        if option.name == "audiodev" and kind == "wav":
            return [("path", str(self._place(what, "wav")))] if "path" in has else []
        if option.name == "object" and kind == "filter-dump" and "file" in has:
            return [("file", str(self._place(what, "dump")))]
        if option.name == "netdev" and "addr.path" in has and is_on(first(pairs, "server")):
            return [("addr.path", str(self._socket(what, "net")))]
        if option.name == "netdev" and "local.path" in has:
            return [("local.path", str(self._socket(what, "net")))]
        return []


def _escaped(path: Path) -> str:
    return str(path).replace(",", ",,")


def forwarded(pairs: Pairs, forward: Mapping[int, int] | None) -> Pairs:
    """Return the options of a user network with other ports of the host forwarded, or none."""
    if forward is None:
        return without(pairs, "hostfwd", "hostfwd.")
    return [
        (key, forwarded_rule(value, forward) if key == "hostfwd" else value) for key, value in pairs
    ]


def forwarded_rule(rule: str, forward: Mapping[int, int]) -> str:
    """Return a rule, as in `hostfwd=tcp:127.0.0.1:2222-:22`, with another port of the host."""
    host, dash, guest = rule.partition("-")
    address, colon, port = host.rpartition(":")
    if port.isdecimal() and int(port) in forward:
        port = str(forward[int(port)])
    return f"{address}{colon}{port}{dash}{guest}"
