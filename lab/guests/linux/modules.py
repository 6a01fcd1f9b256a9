"""Kernel modules for the guest's devices: which ones, and in which order they load.

The kernel's package has its drivers as modules, and no list of what needs what: that list is made
when a package is installed, and ours never is.  But each module names what it needs.

A driver that the package does not have is taken to be in the kernel itself.
"""

import lzma
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

DRIVERS: Mapping[str, tuple[str, ...]] = {
    "disk-ide": ("ata_piix", "sd_mod"),
    "disk-virtio": ("virtio_pci", "virtio_blk"),
    "disk-scsi": ("virtio_pci", "virtio_scsi", "sd_mod"),
    "net": ("virtio_pci", "virtio_net"),
    "balloon": ("virtio_pci", "virtio_balloon"),
}
"""The drivers of each device; the name is that of the list in the initramfs."""


def collect_modules(tree: Path) -> dict[str, bytes]:
    """Return every module that `DRIVERS` needs out of an unpacked kernel package, by name."""
    paths = {
        path.name.split(".")[0].replace("-", "_"): path
        for suffix in ("*.ko", "*.ko.xz")
        for path in sorted((tree / "lib" / "modules").rglob(suffix))
    }
    found: dict[str, bytes] = {}
    wanted = [name for names in DRIVERS.values() for name in names]
    while wanted:
        name = wanted.pop()
        if name not in found and name in paths:
            content = paths[name].read_bytes()
            found[name] = lzma.decompress(content) if paths[name].suffix == ".xz" else content
            wanted += needs(found[name])
    return found


def needs(module: bytes) -> list[str]:
    """Return the names of the modules that `module` says it depends on."""
    match = re.search(rb"(?:^|\0)depends=([^\0]*)\0", module)
    return (
        [name.replace("-", "_") for name in match[1].decode().split(",") if name] if match else []
    )


def load_order(names: Iterable[str], modules: Mapping[str, bytes]) -> list[str]:
    """Return those of `names`, and of what they need, that are there, in an order that works."""
    order: list[str] = []

    def add(name: str) -> None:
        if name in modules and name not in order:
            for needed in needs(modules[name]):
                add(needed)
            order.append(name)

    for name in names:
        add(name)
    return order
