"""What a campaign stands on: this host and the builds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from lab.guests.linux.build import find_guest
from lab.guests.micro.build import find_microguest
from lab.host.info import HostInfo
from lab.qemu.build import find_qemu
from lab.scenario.machine import GuestKind
from lab.scenario.plan import Plan

# What a set calls the software of a guest.  There was no other than Linux at first.
GUEST_BINARY: Mapping[GuestKind, str] = {"linux": "guest", "micro": "microguest"}


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
        found = msgspec.to_builtins(
            find_microguest() if kind == "micro" else find_guest(), enc_hook=str
        )
        # Where its files lie is this machine's business, too.
        files = ("kernel", "initramfs", "rom")
        binaries[GUEST_BINARY[kind]] = {k: v for k, v in found.items() if k not in files}
    host = msgspec.to_builtins(HostInfo.collect())
    if fallback:
        host["accel_fallback"] = fallback
    return Ground(host=host, binaries=binaries)
