"""What QEMU does for a snapshot: one module per mechanism.

To add one: a subclass of `base.Mechanism` in a module of its own, and its entries in `_KINDS`.
"""

from lab.scenario.methods import Method
from lab.snapshot.mechanisms.background import PatchedBackground, UnpatchedBackground
from lab.snapshot.mechanisms.base import Mechanism
from lab.snapshot.mechanisms.precopy import Precopy
from lab.snapshot.mechanisms.stopped import Stopped

_KINDS: dict[tuple[str, str], type[Mechanism]] = {
    ("background", "patched"): PatchedBackground,
    ("background", "unpatched"): UnpatchedBackground,
    ("precopy", "patched"): Precopy,
    ("precopy", "unpatched"): Precopy,
    ("stopped", "patched"): Stopped,
    ("stopped", "unpatched"): Stopped,
}


def mechanism_of(how: Method, variant: str) -> Mechanism:
    """Return what the QEMU `variant` (`patched` or `unpatched`) does for a method."""
    return _KINDS[how.mechanism, variant](how, variant)
