"""The methods: ways to take a snapshot."""

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from lab.errors import UsageError

Variant = Literal["patched", "unpatched"]
Sanitizer = Literal["address", "thread"]
"""What the compiler checks while QEMU runs: addresses and undefined behaviour, or data races."""
Mechanism = Literal["background", "precopy", "stopped"]


MAPPED_RAM = "mapped-ram"
"""The capability that changes the image's format, and so is needed to restore it as well."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to take a snapshot.

    `binary` is the QEMU it needs (`any`: either), `engine` the patched binary's
    `x-snapshot-engine` or None, `mechanism` what QEMU does:
    `background` saves RAM while the guest runs, in the state of one instant; `precopy` copies
    RAM while the guest runs until little is left and stops it for the rest; `stopped` stops the
    guest for all of it.  `live` is whether the image shows the instant of the request, and
    `direct_io` whether pages are written past the host's page cache, which the file system of the
    image has to permit.
    """

    name: str
    title: str
    binary: Literal["patched", "unpatched", "any"]
    mechanism: Mechanism
    live: bool
    engine: str | None = None
    capabilities: tuple[str, ...] = ()
    direct_io: bool = False

    @property
    def is_stream(self) -> bool:
        """Whether its image is written from the first byte to the last, so that a pipe would do."""
        return MAPPED_RAM not in self.capabilities and not self.direct_io

    def runs_on(self, variant: str) -> bool:
        """Return whether the QEMU `variant` (`patched` or `unpatched`) can do this method."""
        return self.binary in ("any", variant)

    @property
    def preferred_variant(self) -> Variant:
        """The QEMU to measure this method with: the unpatched one wherever that can do it."""
        return "patched" if self.binary == "patched" else "unpatched"


def _methods() -> Iterator[Method]:
    background = ("background-snapshot",)
    yield Method(
        name="live",
        title="live, a fault thread copies pages aside, a sweep releases memory in chunks",
        binary="patched",
        mechanism="background",
        live=True,
        engine="copy",
        capabilities=background,
    )
    yield Method(
        name="live-rfc",
        title="live, a fault thread hands pages to the snapshot thread (the RFC's design)",
        binary="patched",
        mechanism="background",
        live=True,
        engine="rfc",
        capabilities=background,
    )
    yield Method(
        name="live-inline",
        title="live, one thread for faults and sweep (upstream's engine in the patched QEMU)",
        binary="patched",
        mechanism="background",
        live=True,
        engine="inline",
        capabilities=background,
    )
    yield Method(
        name="live-mapped",
        title="live, into a file where each page has its place (mapped-ram)",
        binary="patched",
        mechanism="background",
        live=True,
        engine="copy",
        capabilities=(*background, MAPPED_RAM),
    )
    yield Method(
        name="live-direct",
        title="live, into a file where each page has its place, past the host's page cache",
        binary="patched",
        mechanism="background",
        live=True,
        engine="copy",
        capabilities=(*background, MAPPED_RAM),
        direct_io=True,
    )
    yield Method(
        name="live-inline-mapped",
        title="live, upstream's engine, into a file where each page has its place",
        binary="patched",
        mechanism="background",
        live=True,
        engine="inline",
        capabilities=(*background, MAPPED_RAM),
    )
    yield Method(
        name="background",
        title="live, unpatched QEMU's own background-snapshot",
        binary="unpatched",
        mechanism="background",
        live=True,
        capabilities=background,
    )
    yield Method(
        name="migrate-to-file",
        title="ordinary precopy migration to a file, then continue",
        binary="any",
        mechanism="precopy",
        live=False,
    )
    yield Method(
        name="stop-and-copy",
        title="stop, migrate to a file, continue",
        binary="any",
        mechanism="stopped",
        live=True,
    )


METHODS: Mapping[str, Method] = types.MappingProxyType({m.name: m for m in _methods()})
"""Every method by name, in the order in which tables and figures show them."""


def method(name: str) -> Method:
    """Return the method called `name`; raise `UsageError` when there is none."""
    found = METHODS.get(name)
    if found is None:
        raise UsageError(f"unknown method {name!r}", f"choose from: {', '.join(METHODS)}")
    return found
