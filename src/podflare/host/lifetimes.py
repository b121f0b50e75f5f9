"""When a sandbox ends, and when that is told before.  Pure: times come in."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from podflare.host.lineage import Terms
from podflare.host.tiers import Tier
from podflare.wire.api import LifetimesRequest

LONGEST_LEAD_S = 60.0
LEAD_SHARE = 5
"""The end is told a minute before, but not before the last fifth of a short life."""


@dataclass(frozen=True)
class Left:
    """Seconds until the end; None where nothing sets one."""

    life_s: float | None
    idle_s: float | None

    def due(self, terms: Terms) -> tuple[float, str] | None:
        """The nearer end, and the cause to say then."""
        ends = []
        if self.life_s is not None:
            ends.append((self.life_s, f"its lifetime of {terms.timeout_seconds} s was over (timeout_seconds)"))
        if self.idle_s is not None:
            ends.append((self.idle_s, f"it was idle for {terms.idle_timeout_seconds} s (idle_timeout_seconds)"))
        return min(ends) if ends else None


def left(terms: Terms, *, age_s: float, idle_s: float) -> Left:
    """What is left of both lifetimes; negative when one is over."""
    life, idle = terms.timeout_seconds, terms.idle_timeout_seconds
    return Left(None if life is None else life - age_s, None if idle is None else idle - idle_s)


def lead_s(lifetime_s: int) -> float:
    """How long before its end a sandbox of this lifetime tells it."""
    return min(LONGEST_LEAD_S, lifetime_s / LEAD_SHARE)


def changed(terms: Terms, request: LifetimesRequest, tier: Tier, *, age_s: float) -> Terms:
    """The terms after a change.  The cap of a tier holds for the whole life, however often it is extended."""
    notes = [note for note in terms.warnings if not note.startswith(("timeout_seconds=", "idle_timeout_seconds="))]
    life, idle = terms.timeout_seconds, terms.idle_timeout_seconds
    if request.timeout_seconds is not None:
        # Told as it was at the creation: counted from there.
        life = math.ceil(age_s) + request.timeout_seconds
        if tier.timeout_seconds is not None and life > tier.timeout_seconds:
            asked = f"timeout_seconds={request.timeout_seconds} from now is a life of {life} s"
            notes.append(f"{asked}, more than this key may have: it is {tier.timeout_seconds} (tier {tier.name})")
            life = tier.timeout_seconds
    if request.idle_timeout_seconds is not None:
        idle = request.idle_timeout_seconds
        if tier.idle_timeout_seconds is not None and idle > tier.idle_timeout_seconds:
            notes.append(tier.cut("idle_timeout_seconds", idle, tier.idle_timeout_seconds))
            idle = tier.idle_timeout_seconds
    return replace(terms, timeout_seconds=life, idle_timeout_seconds=idle, warnings=tuple(notes))
