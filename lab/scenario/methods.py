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

    In figures `hue` is its colour, by number (`lab.figures.style.COLOURS`), and `broken` whether
    its line is.  There are more methods than colours: one that differs from another by the file's
    format alone shares its hue.
    """

    name: str
    title: str
    binary: Literal["patched", "unpatched", "any"]
    mechanism: Mechanism
    live: bool
    hue: int
    broken: bool = False
    engine: str | None = None
    capabilities: tuple[str, ...] = ()
    direct_io: bool = False

    @property
    def has_places(self) -> bool:
        """Whether each page has its place in the image, which then can be read by many at once."""
        return MAPPED_RAM in self.capabilities

    @property
    def is_stream(self) -> bool:
        """Whether its image is written from the first byte to the last, so that a pipe would do."""
        return not self.has_places and not self.direct_io

    def runs_on(self, variant: str) -> bool:
        """Return whether the QEMU `variant` (`patched` or `unpatched`) can do this method."""
        return self.binary in ("any", variant)

    @property
    def preferred_variant(self) -> Variant:
        """The QEMU to measure this method with: the unpatched one wherever that can do it."""
        return "patched" if self.binary == "patched" else "unpatched"


_BACKGROUND = ("background-snapshot",)


def _patched(
    name: str,
    title: str,
    engine: str,
    *capabilities: str,
    hue: int,
    broken: bool = False,
    direct_io: bool = False,
) -> Method:
    """A method of one of the patched QEMU's engines."""
    return Method(
        name=name,
        title=f"live, {title}",
        binary="patched",
        mechanism="background",
        live=True,
        hue=hue,
        broken=broken,
        engine=engine,
        capabilities=(*_BACKGROUND, *capabilities),
        direct_io=direct_io,
    )


def _methods() -> Iterator[Method]:
    yield _patched(
        "live",
        "a fault thread copies pages aside, a sweep releases memory in chunks",
        "copy",
        hue=0,
    )
    yield _patched(
        "live-rfc",
        "a fault thread hands pages to the snapshot thread (the RFC's design)",
        "rfc",
        hue=1,
    )
    yield _patched(
        "live-inline",
        "one thread for faults and sweep (upstream's engine in the patched QEMU)",
        "inline",
        hue=2,
    )
    yield _patched(
        "live-mapped",
        "into a file where each page has its place (mapped-ram)",
        "copy",
        MAPPED_RAM,
        hue=5,
    )
    yield _patched(
        "live-direct",
        "into a file where each page has its place, past the host's page cache",
        "copy",
        MAPPED_RAM,
        hue=5,
        broken=True,
        direct_io=True,
    )
    yield _patched(
        "live-inline-mapped",
        "upstream's engine, into a file where each page has its place",
        "inline",
        MAPPED_RAM,
        hue=2,
        broken=True,
    )
    yield Method(
        name="background",
        title="live, unpatched QEMU's own background-snapshot",
        binary="unpatched",
        mechanism="background",
        live=True,
        hue=3,
        capabilities=_BACKGROUND,
    )
    yield Method(
        name="migrate-to-file",
        title="ordinary precopy migration to a file, then continue",
        binary="any",
        mechanism="precopy",
        live=False,
        hue=4,
    )
    yield Method(
        name="stop-and-copy",
        title="stop, migrate to a file, continue",
        binary="any",
        mechanism="stopped",
        live=True,
        hue=6,
    )


METHODS: Mapping[str, Method] = types.MappingProxyType({m.name: m for m in _methods()})
"""Every method by name, in the order in which tables and figures show them."""


def method(name: str) -> Method:
    """Return the method called `name`; raise `UsageError` when there is none."""
    found = METHODS.get(name)
    if found is None:
        raise UsageError(f"unknown method {name!r}", f"choose from: {', '.join(METHODS)}")
    return found
