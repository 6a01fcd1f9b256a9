"""The disk images that a command line names, and the line with overlays in their place.

An image is opened by two nodes: one that reads the file, and one that knows the format.  They stand
inside each other, or each has a name and an option of its own, as libvirt writes them.  A filter,
such as a throttle, may stand above.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lab.errors import UsageError
from lab.vm.argv.line import CommandLine
from lab.vm.argv.options import (
    Option,
    Pairs,
    Tree,
    first,
    flattened,
    format_json,
    format_pairs,
    is_json,
    is_on,
    nested,
    parse_json,
    parse_options,
    parse_pairs,
    without,
)

_FILES = ("file", "host_device", "host_cdrom")
"""Drivers that read a file or a device of the host."""

_FORMATS = frozenset(
    (
        *("raw", "qcow2", "qcow", "qed", "vmdk", "vdi", "vhdx", "vpc", "dmg", "cloop", "bochs"),
        *("parallels", "luks"),
        # Not said: QEMU looks what it is.
        *("",),
    )
)

_CHILDREN = ("file", "image", "raw", "target", "children", "data-file", "header")
"""Where a node has others below it, apart from its backing file."""

_COMMON = ("node-name", "read-only", "auto-read-only", "force-share", "detect-zeroes", "discard")
"""What any node has, apart from `cache`, and not the format."""

# What each of these options is a short form of, in QEMU's order of units.
_SHORT: Mapping[str, Pairs] = {
    "": [("index", "0"), ("media", "disk")],
    "hda": [("index", "0"), ("media", "disk")],
    "hdb": [("index", "1"), ("media", "disk")],
    "hdc": [("index", "2"), ("media", "disk")],
    "hdd": [("index", "3"), ("media", "disk")],
    "cdrom": [("index", "2"), ("media", "cdrom")],
    "fda": [("if", "floppy"), ("index", "0")],
    "fdb": [("if", "floppy"), ("index", "1")],
    "pflash": [("if", "pflash")],
    "mtdblock": [("if", "mtd")],
    "sd": [("if", "sd")],
}

_PROTOCOL = re.compile(r"(?P<name>[^/:]*):(?P<rest>.*)", re.S)


@dataclass(frozen=True, kw_only=True)
class DiskOption:
    """A disk image on a command line."""

    option: str
    """The option that names it, such as "-drive"; empty for an image that stands alone."""
    index: int
    """Where in `arguments` the option begins."""
    name: str
    """The name of the node that holds its content, or the id of its drive; may be empty."""
    filename: str
    """As it is on the line."""
    path: Path | None
    """The file, absolute; None for what is no file, such as "nbd://host/export"."""
    format: str
    """The format, such as "qcow2"; empty where QEMU has to find out."""
    read_only: bool
    aio: str
    """Who does its I/O; empty where the line leaves it to QEMU."""


def disks(line: CommandLine) -> tuple[DiskOption, ...]:
    """Return the disk images on a command line, in its order; not those of backing chains.

    A drive without a medium is not among them.

    :raise UsageError: when the line cannot be understood.
    """
    blocks = Blocks(line)
    return tuple(sorted((image.disk for image in blocks.images), key=lambda disk: disk.index))


@dataclass(kw_only=True)
class _Node:
    """A node of the block graph, as an option or a part of one."""

    tree: Tree
    option: Option


@dataclass(kw_only=True)
class _Image:
    disk: DiskOption
    leaf: _Node
    holder: _Node | None
    """What knows the format; None when the file is used as it is."""


@dataclass(kw_only=True)
class _Drive:
    """A `-drive`, or a short form of one."""

    option: Option
    pairs: Pairs
    tree: Tree = field(default_factory=dict)
    """Its nodes, where they are not named by `file` alone."""


class Blocks:
    """The block devices of a command line."""

    def __init__(self, line: CommandLine) -> None:
        self._line = line
        self._nodes: dict[str, _Node] = {}
        self._drives: list[_Drive] = []
        self._json: set[int] = set()
        self._backing_cut: list[str] = []
        self.images: list[_Image] = []
        options = parse_options(line.arguments)
        for option in options:
            if option.name == "blockdev":
                self._add_node(option)
            elif option.name == "drive" or option.name in _SHORT:
                self._add_drive(option)
        referred = {name for node in self._all_trees() for name in _references(node)}
        for name, node in self._nodes.items():
            if name not in referred:
                self._find_images(node, [], name)
        for drive in self._drives:
            self._find_in_drive(drive)

    def _add_node(self, option: Option) -> None:
        if is_json(option.value or ""):
            tree = parse_json(option)
            self._json.add(option.index)
        else:
            tree = nested(parse_pairs(option.value or "", "driver"))
        name = str(tree.get("node-name", ""))
        if not name:
            raise UsageError(
                f"{option} has no node-name", "this is not the line of a QEMU that runs"
            )
        self._nodes[name] = _Node(tree=tree, option=option)

    def _add_drive(self, option: Option) -> None:
        if option.name == "drive":
            pairs = parse_pairs(option.value or "")
        else:
            pairs = [*_SHORT[option.name], ("file", option.value or "")]
        drive = _Drive(option=option, pairs=pairs)
        driver = first(pairs, "format") or first(pairs, "driver") or ""
        says_more = any(key == "filename" or key.startswith("file.") for key, _ in pairs)
        # A drive may be without a medium, and name the format of the next one.
        if first(pairs, "file") is None and (says_more or driver not in _FORMATS):
            drive.tree = nested(
                [("driver" if key == "format" else key, value) for key, value in pairs]
            )
        self._drives.append(drive)

    def _all_trees(self) -> Iterator[Tree]:
        yield from (node.tree for node in self._nodes.values())
        yield from (drive.tree for drive in self._drives)

    def _find_images(
        self, node: _Node, above: Sequence[_Node], name: str, *, read_only: bool = False
    ) -> None:
        """Collect the images below a node, whose backing files are not looked at."""
        driver = str(node.tree.get("driver", ""))
        read_only = read_only or is_on(node.tree.get("read-only"))
        children = list(self._children(node))
        if children:
            for child in children:
                self._find_images(child, [*above, node], name, read_only=read_only)
            return
        holder = next((n for n in reversed(above) if n.tree.get("driver") in _FORMATS), None)
        is_file = driver in _FILES
        filename = str(node.tree.get("filename", "")) if is_file else _described(node.tree)
        held = holder or node
        self.images.append(
            _Image(
                disk=DiskOption(
                    option=f"-{node.option.name}",
                    index=node.option.index,
                    name=str(held.tree.get("node-name") or name),
                    filename=filename,
                    path=self._line.absolute(filename) if is_file else None,
                    format="raw" if holder is None else str(holder.tree["driver"]),
                    read_only=read_only,
                    aio=str(node.tree.get("aio", "")),
                ),
                leaf=node,
                holder=holder,
            )
        )

    def _children(self, node: _Node) -> Iterator[_Node]:
        for each in _below(node.tree):
            if isinstance(each, dict):
                yield _Node(tree=each, option=node.option)
            elif isinstance(each, str) and each in self._nodes:
                yield self._nodes[each]

    def _find_in_drive(self, drive: _Drive) -> None:
        pairs = drive.pairs
        read_only = (
            is_on(first(pairs, "readonly"))
            or is_on(first(pairs, "read-only"))
            or first(pairs, "media") == "cdrom"
        )
        name = first(pairs, "id") or first(pairs, "node-name") or ""
        filename = first(pairs, "file")
        if filename is None:
            if not drive.tree:
                return
            root = _Node(tree=drive.tree, option=drive.option)
            root.tree.setdefault("driver", "")
            below = root.tree.get("file")
            if isinstance(below, dict):
                below.setdefault("driver", "file")
            self._find_images(root, [], name, read_only=read_only)
            return
        if not filename:
            return
        path = self._path_of(filename)
        format_ = first(pairs, "format") or first(pairs, "driver") or ""
        leaf = _Node(tree={}, option=drive.option)
        self.images.append(
            _Image(
                disk=DiskOption(
                    option=f"-{drive.option.name}" if drive.option.name else "",
                    index=drive.option.index,
                    name=name,
                    filename=filename,
                    path=path,
                    format="raw" if format_ in _FILES else format_,
                    read_only=read_only,
                    aio=first(pairs, "aio") or "",
                ),
                leaf=leaf,
                holder=None,
            )
        )

    def _path_of(self, filename: str) -> Path | None:
        """The file that a name means; QEMU takes what is before a colon for a protocol."""
        match = _PROTOCOL.fullmatch(filename)
        if match is None:
            return self._line.absolute(filename)
        if match["name"] in _FILES:
            return self._line.absolute(match["rest"])
        return None

    # Rewriting

    def replaced(self, overlays: Mapping[Path, Path]) -> dict[int, tuple[str, ...]]:
        """Return the words of each option that names disks, with qcow2 overlays in their places.

        By where the option begins.  One that is no longer needed has no words.

        :raise UsageError: when an image cannot be replaced, or one that is written to has no
            overlay.
        """
        drives = {drive.option.index: drive for drive in self._drives}
        for drive in self._drives:
            if is_on(first(drive.pairs, "snapshot")):
                raise UsageError(
                    f"{drive.option} keeps what the guest writes in a file without a name "
                    "(snapshot=on)",
                    "start the machine with an overlay of the disk instead",
                )
        for image in self.images:
            disk = image.disk
            overlay = None if disk.path is None else overlays.get(disk.path)
            if overlay is None:
                if not disk.read_only:
                    raise UsageError(*_without_overlay(disk))
                continue
            drive_ = drives.get(disk.index)
            if drive_ is not None and not drive_.tree:
                drive_.pairs = _drive_on(drive_, disk, overlay)
            else:
                self._put(image, overlay)
        return self._words()

    def _put(self, image: _Image, overlay: Path) -> None:
        leaf = image.leaf.tree
        holder = None if image.holder is None else image.holder.tree
        what = f"{image.disk.option} of {image.disk.filename}"
        leaf["driver"] = "file"
        leaf["filename"] = str(overlay)
        # What a device is asked through for reservations.
        leaf.pop("pr-manager", None)
        if holder is None:
            inner = {k: v for k, v in leaf.items() if k not in (*_COMMON, "cache")}
            outer = {k: v for k, v in leaf.items() if k in (*_COMMON, "cache")}
            leaf.clear()
            leaf.update(outer, driver="qcow2", file=inner)
            return
        _check_holder(what, holder)
        backing = holder.pop("backing", None)
        if isinstance(backing, str):
            self._backing_cut.append(backing)
        elif isinstance(backing, dict):
            self._backing_cut.extend(_references(backing))
        if holder["driver"] != "qcow2" and image.leaf.option.name == "blockdev":
            kept = {k: v for k, v in holder.items() if k in (*_COMMON, "cache", "file")}
            holder.clear()
            holder.update(kept)
        # Where the content of an image lay apart from it, the image's own header says where.
        holder.pop("data-file", None)
        holder["driver"] = "qcow2"

    def _words(self) -> dict[int, tuple[str, ...]]:
        unused = self._unused()
        words: dict[int, tuple[str, ...]] = {}
        for name, node in self._nodes.items():
            index = node.option.index
            if name in unused:
                words[index] = ()
            elif index in self._json:
                words[index] = ("-blockdev", format_json(node.tree))
            else:
                words[index] = ("-blockdev", format_pairs(list(flattened(node.tree)), "driver"))
        for drive in self._drives:
            option = drive.option
            if drive.tree:
                pairs = [pair for pair in flattened(drive.tree) if pair != ("driver", "")]
                words[option.index] = ("-drive", format_pairs(pairs))
            elif option.name == "drive" or first(drive.pairs, "format"):
                words[option.index] = ("-drive", format_pairs(drive.pairs))
            else:
                words[option.index] = option.words
        return words

    def _unused(self) -> set[str]:
        """Nodes that were there for backing files alone, which overlays lead to by themselves."""
        referred = {name for tree in self._all_trees() for name in _references(tree)}
        unused: set[str] = set()
        asked = list(self._backing_cut)
        while asked:
            name = asked.pop()
            if name in referred or name not in self._nodes or name in unused:
                continue
            unused.add(name)
            others = (n.tree for key, n in self._nodes.items() if key not in unused)
            trees = [*others, *(drive.tree for drive in self._drives)]
            referred = {each for tree in trees for each in _references(tree)}
            asked += _references(self._nodes[name].tree)
        return unused


def _below(tree: Tree) -> Iterator[object]:
    """What a node has below it: nodes, or names of nodes; its backing file is not among them."""
    for key in _CHILDREN:
        child = tree.get(key)
        if key != "children":
            yield child
        elif isinstance(child, dict):
            yield from child.values()
        elif isinstance(child, list):
            yield from child


def _references(tree: Tree) -> list[str]:
    """The names of nodes that a node has below it, backing files among them."""
    found: list[str] = []
    for each in (*_below(tree), tree.get("backing")):
        if isinstance(each, str):
            found.append(each)
        elif isinstance(each, dict):
            found += _references(each)
    return found


def _described(tree: Tree) -> str:
    """What a node without a file reads, in a few words."""
    parts = [f"{key}={value}" for key, value in flattened(tree) if key not in _COMMON]
    return ",".join(parts)


def _without_overlay(disk: DiskOption) -> tuple[str, str]:
    what = disk.option or "the image"
    if disk.path is None:
        return (
            f"{what} of {disk.filename} is written to and is no file of this host, so that it "
            "has no state of the instant",
            "start the machine with the disk in a file, or with it read-only",
        )
    return (
        f"{what} of {disk.filename} is written to, and no layer of it is in the snapshot",
        "take the snapshot again, or start the machine with the disk read-only",
    )


def _check_holder(what: str, holder: Tree) -> None:
    _check_format(what, str(holder["driver"]), [key for key, _ in flattened(holder)])


def _check_format(what: str, format_: str, keys: Sequence[str]) -> None:
    if format_ == "raw" and any(key in ("offset", "size") for key in keys):
        raise UsageError(
            f"{what} is a part of a file (offset, size), on which no overlay can be put",
            "put the disk into a file of its own",
        )
    if format_ == "luks" or any(key == "key-secret" or key.startswith("encrypt.") for key in keys):
        raise UsageError(
            f"{what} is encrypted, and the layers of a snapshot are not",
            "start the machine with a disk that is not encrypted by QEMU",
        )


def _drive_on(drive: _Drive, disk: DiskOption, overlay: Path) -> Pairs:
    """The `-drive` with an overlay in its place."""
    pairs = drive.pairs
    _check_format(f"-drive of {disk.filename}", disk.format, [key for key, _ in pairs])
    kept = without(pairs, "backing", "backing.", "driver", "format", "file.driver", "data-file.")
    changed = [(k, str(overlay) if k == "file" else v) for k, v in kept]
    return [*changed, ("format", "qcow2")]
