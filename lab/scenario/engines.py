"""The engines of a live snapshot in the patched QEMU, and the sizes that one of them has.

To add one: its entry in `ENGINES`, and methods of it in `methods`.
"""

import types
from collections.abc import Mapping
from dataclasses import dataclass

from lab.scenario.require import require, require_int

PAGE_KIB = 4

DEFAULT_CHUNK_KIB = 2048
"""What the engine `copy` releases at a time by default."""

DENSE_PAGES = 64
"""What the engine `copy` takes along with a fault of a guest that writes densely."""

HUGE_PAGE_KIB = 2048


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much the engine `copy` handles at a time.  QEMU takes both when it starts, so they are
    parameters of the machine (`lab.scenario.machine.Machine`, which says what they mean).

    Raises `UsageError` for values that cannot work.
    """

    fault_around_pages: int = 0
    chunk_kib: int = DEFAULT_CHUNK_KIB

    def __post_init__(self) -> None:
        require_int("fault_around_pages", self.fault_around_pages, 0, 1 << 20)
        require_int("chunk_kib", self.chunk_kib, 64 * PAGE_KIB, 1 << 20)
        for name in ("fault_around_pages", "chunk_kib"):
            value = getattr(self, name)
            require(value & (value - 1) == 0, f"{name} is {value}", "give a power of two")
        require(
            self.fault_around_pages * PAGE_KIB <= self.chunk_kib,
            f"{self.fault_around_pages} pages are more than a chunk of {self.chunk_kib} KiB",
            "use fewer fault_around_pages, or a larger chunk_kib",
        )

    @property
    def sweep_pages(self) -> int:
        """Pages that the sweep releases with one call."""
        return self.chunk_kib // PAGE_KIB

    @property
    def fault_pages(self) -> int:
        """The most pages that are released because of one fault."""
        return self.fault_around_pages or DENSE_PAGES

    def buffer_needed_kib(self, *, huge: bool) -> int:
        """The smallest copy buffer with which the engine can work.

        :param huge: guest RAM consists of huge pages, which are never handled in part.
        """
        least_kib = HUGE_PAGE_KIB if huge else 0
        group_kib = max(self.fault_around_pages, DENSE_PAGES) * PAGE_KIB
        return max(self.chunk_kib, least_kib) + max(group_kib, least_kib)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One engine: QEMU's name of it (`x-snapshot-engine`), and whether it has `Sizes`, or handles
    one page at a time.
    """

    name: str
    title: str
    has_sizes: bool

    def sweep_pages(self, sizes: Sizes) -> int:
        """Pages that its sweep releases with one call."""
        return sizes.sweep_pages if self.has_sizes else 1

    def fault_pages(self, sizes: Sizes) -> int:
        """The most pages that it releases because of one fault."""
        return sizes.fault_pages if self.has_sizes else 1


ENGINES: Mapping[str, Engine] = types.MappingProxyType(
    {
        engine.name: engine
        for engine in (
            Engine(name="copy", title="a fault thread copies pages aside", has_sizes=True),
            Engine(name="rfc", title="a fault thread hands pages over", has_sizes=False),
            Engine(name="inline", title="one thread, upstream's", has_sizes=False),
        )
    }
)
"""Every engine by name."""
