"""QEMU's options: which there are, and how their values are written.

A value is a list of `key=value`, with a comma in it doubled, or JSON.  Both are read into pairs of
a dotted key and a text, and written back.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lab.errors import UsageError

WITH_VALUE = frozenset(
    (
        *("M", "accel", "acpitable", "action", "add-fd", "append", "audio", "audiodev", "bios"),
        *("blockdev", "boot", "cdrom", "chardev", "chroot", "compat", "cpu", "d", "D", "debugcon"),
        *("device", "dfilter", "display", "drive", "dtb", "dump-vmstate", "echr", "fda", "fdb"),
        *("fsdev", "fw_cfg", "g", "gdb", "global", "hda", "hdb", "hdc", "hdd", "icount"),
        *("incoming", "initrd", "iscsi", "k", "kernel", "L", "loadvm", "m", "machine", "mem-path"),
        *("mon", "monitor", "msg", "mtdblock", "name", "net", "netdev", "nic", "numa", "object"),
        *("option-rom", "overcommit", "parallel", "pflash", "pidfile", "plugin", "prom-env"),
        *("qmp", "qmp-pretty", "qtest", "qtest-log", "readconfig", "rotate", "rtc", "run-with"),
        *("runas", "sandbox", "sd", "seed", "semihosting-config", "serial", "set", "shim"),
        *("smbios", "smp", "soundhw", "spice", "tb-size", "tpmdev", "trace", "usbdevice", "uuid"),
        *("vga", "virtfs", "vnc", "watchdog", "watchdog-action", "writeconfig", "xen-domid"),
    )
)
"""Those that take a value.  Some of each list are of an older or a newer QEMU than the others."""

WITHOUT_VALUE = frozenset(
    (
        *("S", "alt-grab", "async-teardown", "audio-help", "ctrl-grab", "curses", "daemonize"),
        *("enable-fips", "enable-kvm", "enable-sync-profile", "full-screen", "h", "help"),
        *("jitdump", "mem-prealloc", "no-acpi", "no-fd-bootchk", "no-hpet", "no-quit"),
        *("no-reboot", "no-shutdown", "no-user-config", "nodefaults", "nographic", "old-param"),
        *("only-migratable", "perfmap", "portrait", "preconfig", "s", "sdl", "semihosting"),
        *("singlestep", "snapshot", "usb", "version", "win2k-hack", "xen-attach"),
        *("xen-domid-restrict",),
    )
)

_SAID_WITHOUT = "on"


@dataclass(frozen=True)
class Option:
    """An option in its place, or an image that stands alone."""

    index: int
    """Where in the arguments it begins."""
    name: str
    """Without dashes; empty for an image that stands alone."""
    value: str | None

    @property
    def words(self) -> tuple[str, ...]:
        """As it is written."""
        if not self.name:
            return (self.value or "",)
        return (f"-{self.name}",) if self.value is None else (f"-{self.name}", self.value)

    def __str__(self) -> str:
        return " ".join(self.words)


def parse_options(arguments: Sequence[str]) -> list[Option]:
    """Return the options of a command line, in its order.

    :raise UsageError: for an option that is in no list here, or one without its value.
    """
    found = []
    index = 0
    while index < len(arguments):
        word = arguments[index]
        if not word.startswith("-"):
            found.append(Option(index, "", word))
            index += 1
            continue
        name = word[2:] if word.startswith("--") else word[1:]
        if name in WITHOUT_VALUE:
            found.append(Option(index, name, None))
            index += 1
        elif name not in WITH_VALUE:
            raise UsageError(
                f"{word} is an option of QEMU that the lab does not know",
                "start the machine without it",
            )
        elif index + 1 == len(arguments):
            raise UsageError(f"{word} lacks its value", "this is not the line of a QEMU that runs")
        else:
            found.append(Option(index, name, arguments[index + 1]))
            index += 2
    return found


Pairs = list[tuple[str, str]]
"""Keys and values in their order.  A key may be there more than once: networks have such."""


def parse_pairs(text: str, implied: str = "") -> Pairs:
    """Return what is in a list of `key=value`.

    :param implied: the key of a first value that has none, such as "driver" for `-device`.
    """
    found: Pairs = []
    position = 0
    while position < len(text):
        end = position
        while end < len(text) and text[end] not in "=,":
            end += 1
        key = text[position:end]
        if text[end : end + 1] == "=":
            value, position = _value_from(text, end + 1)
            found.append((key, value))
        elif implied and position == 0:
            value, position = _value_from(text, 0)
            found.append((implied, value))
        else:
            position = end + 1
            # The short form that old lines have: `server,nowait`.
            if key.startswith("no"):
                found.append((key[2:], "off"))
            elif key:
                found.append((key, "on"))
    return found


def _value_from(text: str, start: int) -> tuple[str, int]:
    """The value that begins at `start`, and where the next key begins."""
    parts = []
    while True:
        comma = text.find(",", start)
        if comma < 0:
            parts.append(text[start:])
            return "".join(parts), len(text)
        if text[comma : comma + 2] != ",,":
            parts.append(text[start:comma])
            return "".join(parts), comma + 1
        parts.append(text[start : comma + 1])
        start = comma + 2


def format_pairs(pairs: Pairs, implied: str = "") -> str:
    """Write what `parse_pairs` reads; the key of the first is left out where that is implied."""
    words = []
    for position, (key, value) in enumerate(pairs):
        written = value.replace(",", ",,")
        # A value that has an equals sign would be taken for a key.
        bare = position == 0 and key == implied and value and "=" not in value
        words.append(written if bare else f"{key}={written}")
    return ",".join(words)


def first(pairs: Pairs, key: str) -> str | None:
    """Return the value of a key, the last one as QEMU does; None where it is not there."""
    return next((value for name, value in reversed(pairs) if name == key), None)


def without(pairs: Pairs, *keys: str) -> Pairs:
    """Return the pairs of other keys; a key that ends with a dot stands for all that begin so."""
    return [
        (name, value)
        for name, value in pairs
        if name not in keys and not any(k.endswith(".") and name.startswith(k) for k in keys)
    ]


def is_on(value: object) -> bool:
    """Whether a switch is on, as text or as JSON has it."""
    return value is True or value in ("on", "yes", "true", "y")


# JSON

Tree = dict[str, Any]


def is_json(text: str) -> bool:
    """Whether a value is JSON, as QEMU tells."""
    return text.startswith("{")


def parse_json(option: Option) -> Tree:
    """Return the object that an option has as its value.

    :raise UsageError: when it is none.
    """
    try:
        found = json.loads(option.value or "")
    except ValueError as error:
        raise UsageError(
            f"-{option.name} has a value that is no JSON: {error}",
            "this is not the line of a QEMU that runs",
        ) from error
    assert isinstance(found, dict)
    return found


def format_json(tree: Tree) -> str:
    """Write what `parse_json` reads."""
    return json.dumps(tree, separators=(",", ":"))


def flattened(tree: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Return the leaves of a tree by dotted keys, as `key=value` would have them."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flattened(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list):
        for position, value in enumerate(tree):
            yield from flattened(value, f"{prefix}.{position}")
    else:
        switches = {True: "on", False: "off"}
        yield prefix, switches[tree] if isinstance(tree, bool) else str(tree)


def nested(pairs: Pairs) -> Tree:
    """Return the tree that dotted keys describe.

    :raise UsageError: when a key is both a value and a branch.
    """
    tree: Tree = {}
    for key, value in pairs:
        *branches, leaf = key.split(".")
        place = tree
        for branch in branches:
            place = place.setdefault(branch, {})
            if not isinstance(place, dict):
                raise UsageError(
                    f"{key} and {branch} contradict each other",
                    "this is not the line of a QEMU that runs",
                )
        place[leaf] = value
    return tree


IMPLIED = {
    "M": "type",
    "machine": "type",
    "accel": "accel",
    "audiodev": "driver",
    "blockdev": "driver",
    "chardev": "backend",
    "device": "driver",
    "display": "type",
    "fsdev": "fsdriver",
    "m": "size",
    "mon": "chardev",
    "name": "guest",
    "net": "type",
    "netdev": "type",
    "nic": "type",
    "object": "qom-type",
    "sandbox": "enable",
    "smp": "cpus",
    "tpmdev": "type",
    "trace": "enable",
    "virtfs": "fsdriver",
    "vnc": "vnc",
}
"""The key of a first value that has none, by option."""


def pairs_of(option: Option) -> Pairs:
    """Return the value of an option as pairs, whichever way it is written."""
    text = option.value or ""
    if is_json(text):
        return list(flattened(parse_json(option)))
    return parse_pairs(text, IMPLIED.get(option.name, ""))
