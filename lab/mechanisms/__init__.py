"""What QEMU does for a snapshot: one module per mechanism.

To add one: a subclass of `lab.mechanisms.base.Mechanism` in a module of its own, and its entries
in `_KINDS`.
"""

from lab.mechanisms.background import PatchedBackground, UnpatchedBackground
from lab.mechanisms.base import Mechanism
from lab.mechanisms.precopy import Precopy
from lab.mechanisms.stopped import Stopped
from lab.scenario import Method

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
