"""What one sandbox tried to reach: a bounded list of entries.  Pure: the clock is passed in.

Names come from a guest: whoever makes an entry gives only text, and `printable` bounds it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from podflare.wire.egress import ALLOWED, EgressEntry

KEPT_ENTRIES = 1000
MERGE_MS = 1000
"""The same thing within this time is one entry with a count, so that a tight loop does not push out the rest."""
_MAX_TEXT = 300


@dataclass
class Entry:
    """An `EgressEntry` that still counts."""

    time_ms: int
    protocol: str
    host: str
    address: str
    port: int
    verdict: str
    reason: str = ""
    bytes_in: int = 0
    bytes_out: int = 0
    count: int = 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_TYPES = {one.name: str if one.type == "str" else int for one in fields(Entry)}


def entry_from_json(data: Any) -> EgressEntry:
    """An entry from another process's words.  Raises: ValueError for anything else."""
    if not isinstance(data, dict) or set(data) != set(_TYPES):
        raise ValueError("not an entry")
    for name, kind in _TYPES.items():
        if type(data[name]) is not kind:
            raise ValueError(f"an entry's {name} must be {kind.__name__}")
    shown: dict[str, Any] = {name: printable(value) if type(value) is str else value for name, value in data.items()}
    return EgressEntry(**shown)


def printable(text: str) -> str:
    """`text` with everything but printable ASCII replaced, and cut."""
    cut = text[:_MAX_TEXT]
    return cut if cut.isascii() and cut.isprintable() else "".join(c if " " <= c <= "~" else "?" for c in cut)


class Journal:
    """The newest KEPT_ENTRIES entries and how many older ones were dropped."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._entries: deque[Entry] = deque()
        self.dropped = 0

    def note(
        self, protocol: str, verdict: str, reason: str = "", *, host: str = "", address: str = "", port: int = 0
    ) -> Entry:
        """Add an entry; the caller may go on counting bytes in it."""
        now = int(self._clock() * 1000)
        host, reason, address = printable(host), printable(reason), printable(address)
        last = self._entries[-1] if self._entries else None
        if (
            last is not None
            and (verdict != ALLOWED or protocol == "dns")
            and (last.protocol, last.verdict, last.reason, last.host, last.address, last.port)
            == (protocol, verdict, reason, host, address, port)
            and 0 <= now - last.time_ms <= MERGE_MS
        ):
            last.time_ms = now
            last.count += 1
            return last
        entry = Entry(now, protocol, host, address, port, verdict, reason)
        self._entries.append(entry)
        if len(self._entries) > KEPT_ENTRIES:
            self._entries.popleft()
            self.dropped += 1
        return entry

    def entries(self) -> list[Entry]:
        return list(self._entries)
