"""Names and the addresses that stand for them in one family of sandboxes.  Pure.

A name on an allow-list is answered with an address that nobody has; a connection to it is a connection to the name,
which is looked up only then, outside.  So a cached answer cannot go stale, and no question leaves the gate.
"""

from __future__ import annotations

import hashlib
from ipaddress import IPv4Address

from podflare.egress.addresses import SYNTHETIC_COUNT, SYNTHETIC_FIRST

MAX_NAMES = 4096
"""A wildcard allows names without end; beyond this those not asked for longest are forgotten."""


class NameTable:
    """The names that a family's machines have asked for."""

    def __init__(self, family: str) -> None:
        self._family = family
        self._names: dict[IPv4Address, str] = {}
        self._addresses: dict[str, IPv4Address] = {}

    def address_of(self, name: str) -> IPv4Address:
        """The address that stands for `name`; a gate that starts again picks the same if it can."""
        address = self._addresses.pop(name, None) or self._pick(name)
        self._addresses[name] = address  # at the end: the newest
        return address

    def name_of(self, address: IPv4Address) -> str | None:
        """The name that `address` stands for; None if it stands for none (any more)."""
        name = self._names.get(address)
        if name is not None:
            self._addresses[name] = self._addresses.pop(name)
        return name

    def _pick(self, name: str) -> IPv4Address:
        if len(self._addresses) >= MAX_NAMES:
            oldest = next(iter(self._addresses))
            del self._names[self._addresses.pop(oldest)]
        digest = hashlib.sha256(f"{self._family} {name}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") % SYNTHETIC_COUNT
        while (address := IPv4Address(SYNTHETIC_FIRST + place)) in self._names:
            place = (place + 1) % SYNTHETIC_COUNT
        self._names[address] = name
        return address
