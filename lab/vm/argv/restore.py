"""The command line that restores the snapshot of a machine that another command line made."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lab.errors import UsageError
from lab.vm.argv.blocks import Blocks
from lab.vm.argv.channels import Channels, forwarded, forwarded_rule
from lab.vm.argv.line import CommandLine
from lab.vm.argv.options import (
    IMPLIED,
    Option,
    Tree,
    first,
    flattened,
    format_json,
    format_pairs,
    is_json,
    is_on,
    pairs_of,
    parse_json,
    parse_options,
    parse_pairs,
    without,
)

QMP_ID = "lab-qmp"
"""The character device over which the lab speaks QMP with the restored QEMU."""

_NO_PORTS: Mapping[int, int] = MappingProxyType({})
_NO_NETWORKS: Mapping[str, str] = MappingProxyType({})

_LEFT_OUT = frozenset(("S", "daemonize", "incoming", "loadvm", "pidfile"))

_DESCRIPTORS = frozenset(("fd", "fds", "vhostfd", "vhostfds", "sock_fd"))
_WITH_DESCRIPTORS = ("device", "fsdev", "net", "netdev", "nic", "object", "tpmdev", "virtfs")
_FDSET = "/dev/fdset/"

_SECRETS = ("secret", "tls-creds-", "authz-")
"""Kinds of object that hold a secret, or lead to files with them."""

_FOREIGN = ("vfio-", "vhost-user-", "vhost-vdpa-", "usb-host", "scsi-block", "scsi-generic")
"""Devices that are the host's, or another process's."""


@dataclass(frozen=True)
class RestoreLine(CommandLine):
    """The line of a QEMU that waits for a snapshot (`-S -incoming defer`)."""

    channels: Mapping[str, Path]
    """Where what the first QEMU had elsewhere now is: by option and value, such as
    "-serial pty" or "-chardev charserial0", the UNIX socket or the file in the folder."""


def for_restore(
    line: CommandLine,
    *,
    disks: Mapping[Path, Path],
    machine_type: str,
    folder: Path,
    qmp: int,
    forward: Mapping[int, int] | None = _NO_PORTS,
    networks: Mapping[str, str] = _NO_NETWORKS,
    name: str = "",
    program: Path | None = None,
) -> RestoreLine:
    """Return the command line that restores.

    Its devices are those of `line`, in their order and with their ids, by which the snapshot finds
    them; devices that were plugged in or out meanwhile are not on any line (`device_ids`).
    Relative paths stay, so it has to be run in its folder.

    What the first QEMU serves or writes elsewhere than on a disk is in `folder`.  Kept as it is,
    and in the way of a first QEMU that still runs: a tap network that names its interface, a
    network that listens on a port, a host folder that is shared with the guest.

    :param disks: the qcow2 overlay for each image that is written to, by `DiskOption.path`.
    :param machine_type: the versioned machine type, such as "pc-q35-7.2".
    :param folder: a private folder that exists while the restored QEMU runs.
    :param qmp: the descriptor, inherited, on which the restored QEMU speaks QMP with the lab.
    :param forward: another host port for each forwarded one that is not to be kept; None forwards
        none, so that both QEMUs can run.
    :param networks: what to use for a network instead, as the value of `-netdev` without its id, by
        that id, such as {"hostnet0": "tap,ifname=tap1,script=no"}.
    :param name: what `-name` says instead.
    :param program: another QEMU.
    :raise UsageError: naming an option that cannot be restored, and what to do.
    """
    require_restorable(line, networks=networks)
    block_words = Blocks(line).replaced(disks)
    channels = Channels(folder)
    options = [each for each in parse_options(line.arguments) if not _is_the_labs(each)]
    written: list[Option] = []
    for option in options:
        words = block_words.get(option.index)
        if words is None:
            words = _rewritten(option, channels, forward, networks)
        # Each is at most one option, so that it can be looked at again.
        written += [_with_place(option.index, words)] if words else []
    written = _with_machine(written, machine_type)
    written = _with_consoles(written, channels)
    written = _with_display(written)
    if name:
        written = _with_name(written, name)
    written = _without_unused_secrets(written)
    _require_no_fdset(written)
    arguments = [word for option in written for word in option.words]
    arguments += ["-chardev", f"socket,id={QMP_ID},fd={qmp}"]
    arguments += ["-mon", f"chardev={QMP_ID},mode=control", "-S", "-incoming", "defer"]
    return RestoreLine(program or line.program, tuple(arguments), line.folder, channels.moved)


def device_ids(line: CommandLine) -> frozenset[str]:
    """Return the ids of the devices on a line.

    A machine that has others under /machine/peripheral was changed since it was started.
    """
    options = [each for each in parse_options(line.arguments) if each.name == "device"]
    return frozenset(id_ for each in options if (id_ := first(pairs_of(each), "id")))


def require_restorable(line: CommandLine, *, networks: Mapping[str, str] = _NO_NETWORKS) -> None:
    """Refuse a line whose snapshot could not be restored, apart from its disks.

    :param networks: those that a restore replaces; see `for_restore`.
    :raise UsageError: naming an option, and what to do.
    """
    for option in parse_options(line.arguments):
        _require_plain(option)
        if option.name in _WITH_DESCRIPTORS:
            pairs = pairs_of(option)
            _require_own(option, pairs)
            if option.name == "netdev" and first(pairs, "id") in networks:
                continue
            _require_no_descriptors(option, pairs)


def _require_plain(option: Option) -> None:
    if option.name == "snapshot":
        raise UsageError(
            "-snapshot keeps what the guest writes in files without a name",
            "start the machine with overlays of its disks instead",
        )
    if option.name == "readconfig":
        raise UsageError(
            f"{option} has devices in another file, which the lab does not read",
            "start the machine with all its options on the command line",
        )
    if option.name == "preconfig":
        raise UsageError(
            "with -preconfig a part of the machine is not on its command line",
            "start the machine without it",
        )
    if option.name == "icount" and any(key == "rr" for key, _ in pairs_of(option)):
        raise UsageError(
            f"{option} records or replays, which begins with the machine",
            "start the machine without rr",
        )
    if option.name == "tpmdev":
        raise UsageError(
            f"{option} has the TPM's state outside of QEMU", "start the machine without a TPM"
        )
    if option.name == "set":
        target = (option.value or "").partition("=")[0].split(".")
        if target[0] in ("drive", "chardev", "netdev", "mon", "vnc"):
            raise UsageError(
                f"{option} changes another option, which the lab does not follow",
                f"start the machine with it in -{target[0]}",
            )


def _require_own(option: Option, pairs: Sequence[tuple[str, str]]) -> None:
    kind = first(list(pairs), IMPLIED[option.name]) or ""
    is_foreign = option.name == "device" and kind.startswith(_FOREIGN)
    by_process = option.name in ("netdev", "nic") and kind in ("vhost-user", "vhost-vdpa")
    by_process |= option.name == "object" and kind == "cryptodev-vhost-user"
    if is_foreign or by_process:
        raise UsageError(
            f"{_short(option, pairs)} is not QEMU's own, and its state is not in a snapshot",
            "start the machine without it",
        )


def _short(option: Option, pairs: Sequence[tuple[str, str]]) -> str:
    kind = first(list(pairs), IMPLIED[option.name]) or ""
    id_ = first(list(pairs), "id")
    return f"-{option.name} {kind}" + (f" (id {id_})" if id_ else "")


def _require_no_descriptors(option: Option, pairs: Sequence[tuple[str, str]]) -> None:
    for key, value in pairs:
        leaf = key.rpartition(".")[2]
        if leaf in _DESCRIPTORS or (leaf == "type" and value == "fd"):
            raise UsageError(
                f"{_short(option, pairs)} stands on a file that was open when QEMU was started "
                f"({key}={value}), and which is not there for another",
                "start the machine with a network that names its interface (ifname=)"
                if option.name in ("net", "netdev", "nic")
                else "start the machine with it named by a path",
            )


def _is_the_labs(option: Option) -> bool:
    """Whether it is the lab's own monitor, of a machine that was restored before."""
    if option.name == "chardev":
        return first(pairs_of(option), "id") == QMP_ID
    return option.name == "mon" and first(pairs_of(option), "chardev") == QMP_ID


def _with_place(index: int, words: Sequence[str]) -> Option:
    name = words[0].removeprefix("-") if words[0].startswith("-") else ""
    value = words[-1] if not name or len(words) > 1 else None
    return Option(index, name, value)


def _rewritten(
    option: Option,
    channels: Channels,
    forward: Mapping[int, int] | None,
    networks: Mapping[str, str],
) -> tuple[str, ...]:
    if option.name in _LEFT_OUT or option.name == "add-fd":
        return ()
    if option.name in ("netdev", "nic", "net"):
        option = _network(option, forward, networks)
    if option.name == "object":
        option = _own_memory(option)
    return channels.moved_option(option)


def _network(
    option: Option, forward: Mapping[int, int] | None, networks: Mapping[str, str]
) -> Option:
    pairs = pairs_of(option)
    id_ = first(pairs, "id") or ""
    if option.name == "netdev" and id_ in networks:
        other = [*parse_pairs(networks[id_], "type"), ("id", id_)]
        return Option(option.index, option.name, format_pairs(other, "type"))
    if first(pairs, "type") != "user":
        return option
    if not is_json(option.value or ""):
        value = format_pairs(forwarded(pairs, forward), "type")
        return Option(option.index, option.name, value)
    tree = parse_json(option)
    rules = tree.pop("hostfwd", None)
    if isinstance(rules, list) and forward is not None:
        tree["hostfwd"] = [{"str": forwarded_rule(str(rule["str"]), forward)} for rule in rules]
    return Option(option.index, option.name, format_json(tree))


def _own_memory(option: Option) -> Option:
    """Memory that lies in a file which both QEMUs would write to is the restored one's alone."""
    pairs = pairs_of(option)
    if first(pairs, "qom-type") != "memory-backend-file":
        return option
    path = Path(first(pairs, "mem-path") or "")
    # In a folder QEMU makes a file of its own.
    if not is_on(first(pairs, "share")) or path.is_dir():
        return option
    gone = ("mem-path", "discard-data", "pmem", "align", "readonly", "offset", "rom")
    if is_json(option.value or ""):
        tree: Tree = {k: v for k, v in parse_json(option).items() if k not in gone}
        tree["qom-type"] = "memory-backend-memfd"
        return Option(option.index, option.name, format_json(tree))
    kept = without(pairs, "qom-type", *gone)
    value = format_pairs([("qom-type", "memory-backend-memfd"), *kept], "qom-type")
    return Option(option.index, option.name, value)


def _with_machine(options: Sequence[Option], machine_type: str) -> list[Option]:
    """The options with the versioned machine type in the first place that has a machine."""
    changed: list[Option] = []
    is_set = False
    for option in options:
        if option.name in ("machine", "M"):
            pairs = without(pairs_of(option), "type")
            pairs = pairs if is_set else [("type", machine_type), *pairs]
            is_set = True
            if pairs:
                changed.append(Option(option.index, "machine", format_pairs(pairs, "type")))
        else:
            changed.append(option)
    return changed if is_set else [Option(-1, "machine", machine_type), *changed]


def _with_consoles(options: list[Option], channels: Channels) -> list[Option]:
    """The options with what `-nographic` does about consoles said aloud.

    It puts the first serial port onto standard input and output, unless the line says otherwise.
    """
    names = {option.name for option in options}
    if "nographic" not in names or names & {"serial", "nodefaults"} or _has_isa_serial(options):
        return options
    where = channels.console("-nographic", "serial")
    shared = "" if names & {"monitor", "qmp", "qmp-pretty", "mon"} else "mon:"
    place = next(i for i, option in enumerate(options) if option.name == "nographic")
    said = Option(-1, "serial", shared + where)
    return [*options[: place + 1], said, *options[place + 1 :]]


def _has_isa_serial(options: Sequence[Option]) -> bool:
    return any(
        first(pairs_of(each), "driver") == "isa-serial" for each in options if each.name == "device"
    )


def _with_display(options: list[Option]) -> list[Option]:
    """The options with no window and no VNC by default, which QEMU opens where none is named."""
    said = {"display", "nographic", "vnc", "spice"}
    if any(option.name in said for option in options):
        return options
    return [*options, Option(-1, "display", "none")]


def _with_name(options: Sequence[Option], name: str) -> list[Option]:
    kept = [option for option in options if option.name != "name"]
    said = format_pairs([("guest", name), ("debug-threads", "on")], "guest")
    return [Option(-1, "name", said), *kept]


def _without_unused_secrets(
    options: list[Option], is_file: Callable[[Path], bool] = Path.is_file
) -> list[Option]:
    """The options without secrets that were for what is served no longer.

    libvirt's own go with the machine it started.

    :raise UsageError: when the file of one that is used is gone.
    """
    kept = list(options)
    for option in reversed(options):
        if option.name != "object":
            continue
        pairs = pairs_of(option)
        kind, id_ = first(pairs, "qom-type") or "", first(pairs, "id") or ""
        if not kind.startswith(_SECRETS):
            continue
        if not any(id_ in _values(other) for other in kept if other is not option):
            kept.remove(option)
            continue
        file = first(pairs, "file")
        if kind == "secret" and file and not is_file(Path(file)):
            raise UsageError(
                f"the secret {id_} is in {file}, which is gone",
                "start the machine with the secret in a file that stays",
            )
    return kept


def _values(option: Option) -> Iterator[str]:
    if is_json(option.value or ""):
        yield from (value for _, value in flattened(parse_json(option)))
    elif option.value is not None:
        yield from (value for _, value in parse_pairs(option.value, "first"))


def _require_no_fdset(options: Sequence[Option]) -> None:
    for option in options:
        if _FDSET in (option.value or ""):
            raise UsageError(
                f"{option} is a file that was open when QEMU was started",
                "start the machine with it named by its path",
            )
