"""What a campaign stands on: this host and the builds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from lab.guests.registry import GUESTS
from lab.host.info import HostInfo
from lab.qemu.build import find_qemu
from lab.scenario.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What a campaign stands on: host and builds, as they go into the set.  A resumed set must
    stand on the same.
    """

    host: Mapping[str, Any]
    binaries: Mapping[str, Any]


def survey(plan: Plan, fallback: str = "") -> Ground:
    """Look at this host and at the builds that a plan needs.

    :param fallback: why accelerator "auto" is not KVM, to be kept with what is known of the host.
    :raise HostError: when a build is missing.
    """
    binaries: dict[str, Any] = {}
    for variant in plan.variants:
        # Where a binary lies is this machine's business; what it is, is in its hash.
        found = msgspec.to_builtins(find_qemu(variant), enc_hook=str)
        binaries[str(variant)] = {k: v for k, v in found.items() if k not in ("path", "variant")}
    for kind in plan.guests:
        guest = GUESTS[kind]
        binaries[guest.recorded_as] = guest.find().recorded()
    host = msgspec.to_builtins(HostInfo.collect())
    if fallback:
        host["accel_fallback"] = fallback
    return Ground(host=host, binaries=binaries)
