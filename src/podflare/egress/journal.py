"""What one sandbox tried to reach: a bounded list of entries.  Pure: the clock and the memory are passed in.

It lies in memory that the daemon keeps, so that it outlives a gate that dies, of whatever a guest made it read.
Names come from a guest: whoever makes an entry gives only text, and `printable` bounds it.
"""

from __future__ import annotations

import json
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from podflare.wire.egress import ALLOWED, EgressEntry

KEPT_ENTRIES = 1000
MERGE_MS = 1000
"""The same thing within this time is one entry with a count, so that a tight loop does not push out the rest."""
_MAX_TEXT = 300
_SLOT_BYTES = 1024
_NUMBERS = struct.Struct("=5Q")
_NUMBER, _TIME_MS, _COUNT, _BYTES_IN, _BYTES_OUT = range(5)
_LENGTH = struct.Struct("=H")
_MAX_NUMBER = 2**60
_STORED_TEXT = 120
"""Of host and reason of an entry whose texts do not fit into its slot."""
MEMORY_BYTES = KEPT_ENTRIES * _SLOT_BYTES


class Entry:
    """An `EgressEntry` that still counts.  Its numbers are where they outlive the process."""

    def __init__(
        self, numbers: memoryview, protocol: str, host: str, address: str, port: int, verdict: str, reason: str
    ) -> None:
        """Args: numbers: of its slot, set already."""
        self._numbers: memoryview | list[int] = numbers
        self.protocol, self.host, self.address, self.port = protocol, host, address, port
        self.verdict, self.reason = verdict, reason

    @property
    def number(self) -> int:
        """From 1 on, in the order of their making."""
        return self._numbers[_NUMBER]

    @property
    def time_ms(self) -> int:
        return self._numbers[_TIME_MS]

    @property
    def count(self) -> int:
        return self._numbers[_COUNT]

    @property
    def bytes_in(self) -> int:
        return self._numbers[_BYTES_IN]

    @property
    def bytes_out(self) -> int:
        return self._numbers[_BYTES_OUT]

    def count_in(self, count: int) -> None:
        """So many bytes came."""
        self._numbers[_BYTES_IN] += count

    def count_out(self, count: int) -> None:
        self._numbers[_BYTES_OUT] += count

    def repeat(self, now_ms: int) -> None:
        """The same once more."""
        self._numbers[_COUNT] += 1
        self._numbers[_TIME_MS] = now_ms

    def detach(self) -> None:
        """Its slot goes to another entry; who counts in this one counts for nobody."""
        self._numbers = list(self._numbers)

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _TYPES}


_TYPES = {one.name: str if one.type == "str" else int for one in fields(EgressEntry)}


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

    def __init__(self, clock: Callable[[], float], memory: memoryview | None = None) -> None:
        """Args: memory: MEMORY_BYTES, zero or what a journal before this one left there."""
        self._clock = clock
        self._memory = memory if memory is not None else memoryview(bytearray(MEMORY_BYTES))
        self._entries: deque[Entry] = deque(self._left())
        self._last = self._entries[-1].number if self._entries else 0

    @property
    def dropped(self) -> int:
        return self._last - len(self._entries)

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
            last.repeat(now)
            return last
        if len(self._entries) == KEPT_ENTRIES:
            self._entries.popleft().detach()
        entry = self._store(now, protocol, host, address, port, verdict, reason)
        self._entries.append(entry)
        return entry

    def entries(self) -> list[Entry]:
        return list(self._entries)

    def _store(self, now: int, *texts: Any) -> Entry:
        slot = self._slot(self._last % KEPT_ENTRIES)
        self._last += 1
        body = json.dumps(texts).encode()
        if len(body) > _SLOT_BYTES - _NUMBERS.size - _LENGTH.size:
            body = json.dumps([text[:_STORED_TEXT] if type(text) is str else text for text in texts]).encode()
        slot[: _NUMBERS.size] = bytes(_NUMBERS.size)  # half an entry is none
        _LENGTH.pack_into(slot, _NUMBERS.size, len(body))
        start = _NUMBERS.size + _LENGTH.size
        slot[start : start + len(body)] = body
        _NUMBERS.pack_into(slot, 0, self._last, now, 1, 0, 0)
        return Entry(slot[: _NUMBERS.size].cast("Q"), *texts)

    def _slot(self, number: int) -> memoryview:
        return self._memory[number * _SLOT_BYTES : (number + 1) * _SLOT_BYTES]

    def _left(self) -> list[Entry]:
        """What lies in the memory, oldest first.  It was written by a gate, which hostile code may have taken over."""
        found: dict[int, Entry] = {}
        for place in range(KEPT_ENTRIES):
            slot = self._slot(place)
            number, *_ = _NUMBERS.unpack_from(slot)
            if not 0 < number < _MAX_NUMBER or (number - 1) % KEPT_ENTRIES != place:
                continue
            (length,) = _LENGTH.unpack_from(slot, _NUMBERS.size)
            start = _NUMBERS.size + _LENGTH.size
            try:
                entry = Entry(slot[: _NUMBERS.size].cast("Q"), *json.loads(bytes(slot[start : start + length])))
                entry_from_json(entry.to_json())
            except (ValueError, TypeError, RecursionError):
                continue
            found[number] = entry
        newest = max(found, default=0)
        return [found[number] for number in sorted(found) if number > newest - KEPT_ENTRIES]
