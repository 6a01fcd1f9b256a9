"""The command line that restores the snapshot of a machine that another command line made."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lab.vm.argv.line import CommandLine

_NOTHING: Mapping[int, int] = MappingProxyType({})
_NO_NETWORKS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class RestoreLine(CommandLine):
    """The line of a QEMU that waits for a snapshot (`-S -incoming defer`)."""

    channels: Mapping[str, Path]
    """Where what the first QEMU had elsewhere now is: by option and value, such as
    "-serial pty", the UNIX socket or the file in the private folder."""


def for_restore(
    line: CommandLine,
    *,
    disks: Mapping[Path, Path],
    machine_type: str,
    folder: Path,
    qmp: int,
    forward: Mapping[int, int] | None = _NOTHING,
    networks: Mapping[str, str] = _NO_NETWORKS,
    name: str = "",
    program: Path | None = None,
) -> RestoreLine:
    """Return the command line that restores.

    :param disks: the qcow2 overlay for each image that is written to, by `DiskOption.path`.
    :param machine_type: the versioned machine type, such as "pc-q35-7.2".
    :param folder: a private folder that exists while the restored QEMU runs: sockets and files
        that the first QEMU has elsewhere are in it.
    :param qmp: the descriptor, inherited, on which the restored QEMU speaks QMP with the lab.
    :param forward: another host port for each forwarded one that is not to be kept; None forwards
        none, so that both QEMUs can run.
    :param networks: what to use for a network instead, as the value of `-netdev` without its id, by
        that id, such as {"hostnet0": "tap,ifname=tap1,script=no"}.
    :param name: what `-name` says instead.
    :param program: another QEMU.
    :raise UsageError: naming an option that cannot be restored, and what to do.
    """
    raise NotImplementedError
