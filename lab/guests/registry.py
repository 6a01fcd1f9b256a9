"""Every guest of the lab, by name."""

import types
from collections.abc import Mapping

from lab.guests.guest import Guest, Progress
from lab.guests.linux.guest import LinuxGuest
from lab.guests.micro.guest import Microguest
from lab.scenario.guests import GuestKind

GUESTS: Mapping[GuestKind, Guest] = types.MappingProxyType(
    {guest.name: guest for guest in (LinuxGuest(), Microguest())}
)


async def ensure_guests(progress: Progress | None = None) -> None:
    """Build what is missing of every guest; see `Guest.ensure`."""
    for guest in GUESTS.values():
        await guest.ensure(progress)
