"""Tiers: what the sandboxes of a key may have at most.  Pure; which key is of which tier is in the configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from podflare.errors import BadRequest
from podflare.wire.api import MAX_LIFETIME_S, CreateRequest

DEFAULT = "default"
"""The tier of keys that name none, and of everybody on a daemon without keys."""
MAX_NAME_CHARS = 64


@dataclass(frozen=True)
class Tier:
    """Caps of one owner; None for no cap."""

    name: str
    timeout_seconds: int | None = None
    idle_timeout_seconds: int | None = None
    ram_mib: int | None = None
    rootfs_gb: int | None = None
    sandboxes: int | None = None
    """That live at a time, forks included."""
    snapshots: int | None = None
    snapshots_gb: int | None = None
    """Number and disk of what is kept."""

    def grant(self, asked: CreateRequest, resolved: CreateRequest) -> tuple[CreateRequest, tuple[str, ...]]:
        """`resolved`, capped, and in plain words what of `asked` was cut.

        Args: resolved: `asked` with the daemon's and the template's defaults in the place of what it leaves open.
        """
        granted = replace(
            resolved,
            timeout_seconds=at_most(resolved.timeout_seconds, self.timeout_seconds),
            idle_timeout_seconds=at_most(resolved.idle_timeout_seconds, self.idle_timeout_seconds),
            ram_mib=at_most(resolved.ram_mib, self.ram_mib),
            rootfs_gb=at_most(resolved.rootfs_gb, self.rootfs_gb),
        )
        return granted, tuple(
            self.cut(name, wanted, cap)
            for name, wanted, cap in (
                ("timeout_seconds", asked.timeout_seconds, self.timeout_seconds),
                ("idle_timeout_seconds", asked.idle_timeout_seconds, self.idle_timeout_seconds),
                ("ram_mib", asked.ram_mib, self.ram_mib),
                ("rootfs_gb", asked.rootfs_gb, self.rootfs_gb),
            )
            if wanted is not None and cap is not None and wanted > cap
        )

    def cut(self, name: str, wanted: int, cap: int) -> str:
        return f"{name}={wanted} is more than this key may have: it is {cap} (tier {self.name})"


PUBLISHED: Mapping[str, Tier] = {
    tier.name: tier
    for tier in (
        Tier(DEFAULT),
        # The hosted service's caps; it publishes none for the numbers of sandboxes and snapshots, so those are ours.
        Tier("free", 1800, 300, 1024, 4, sandboxes=40, snapshots=5, snapshots_gb=5),
        Tier("pro", 28_800, 1800, 4096, 16, sandboxes=200, snapshots=50, snapshots_gb=50),
        Tier("scale", 86_400, 7200, 16_384, 64, sandboxes=1000, snapshots=500, snapshots_gb=500),
    )
}
_HIGHEST = {
    "timeout_seconds": MAX_LIFETIME_S,
    "idle_timeout_seconds": MAX_LIFETIME_S,
    "ram_mib": 1 << 20,
    "rootfs_gb": 4096,
    "sandboxes": 1_000_000,
    "snapshots": 1_000_000,
    "snapshots_gb": 1_000_000,
}


def at_most(value: int | None, cap: int | None) -> int | None:
    """The smaller one; None stands for no limit."""
    known = [one for one in (value, cap) if one is not None]
    return min(known) if known else None


def read_tiers(text: str, variable: str) -> dict[str, Tier]:
    """The published tiers, changed and joined by those of a JSON object: name -> caps, each a number or null.

    Raises: BadRequest that begins with `variable` and names what is wrong.
    """
    try:
        given = json.loads(text or "{}")
    except (ValueError, RecursionError) as exc:
        raise BadRequest(f"{variable} must be a JSON object: {exc}") from exc
    if not isinstance(given, dict):
        raise BadRequest(f"{variable} must be a JSON object of tiers")
    found = dict(PUBLISHED)
    for name, caps in given.items():
        if not name or len(name) > MAX_NAME_CHARS or not isinstance(caps, dict):
            raise BadRequest(f"{variable}: tier {name!r:.80} must be an object of caps")
        for cap, value in caps.items():
            if cap not in _HIGHEST:
                raise BadRequest(f"{variable}: tier {name!r}: unknown cap {cap!r:.80}; known: {', '.join(_HIGHEST)}")
            if value is not None and (type(value) is not int or not 1 <= value <= _HIGHEST[cap]):
                raise BadRequest(f"{variable}: tier {name!r}: {cap} must be 1 to {_HIGHEST[cap]}, or null")
        found[name] = replace(found.get(name, Tier(name)), **caps)
    return found


def read_keys(text: str, tiers: Mapping[str, Tier], variable: str) -> list[tuple[str, str]]:
    """(key, tier) of each entry of a comma-separated list of KEY or KEY@TIER.

    Raises: BadRequest that names the entry by its number: the text holds secrets.
    """
    found = []
    for number, entry in enumerate(filter(None, (word.strip() for word in text.split(","))), 1):
        key, at, tier = entry.rpartition("@")
        if at and (not key or tier not in tiers):
            known = ", ".join(tiers)
            raise BadRequest(f"{variable}: entry {number} names no known tier after its @; known: {known}")
        found.append((key, tier) if at else (entry, DEFAULT))
    return found
