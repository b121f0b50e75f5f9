"""From a cell's raw output to the event lines a client gets: the cap that keeps head and tail, the line rule, `seq`.

No I/O and no clock: times come in, encoded lines go out.  Lines are cut and encoded only when the client takes them,
so output that nobody takes costs no more than its raw bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from podflare.wire.events import STDERR, STDOUT, Event, LineSplitter, text_line

SLICE_BYTES = 2 * 1024
"""Raw bytes turned into lines at a time: 2 KiB of empty lines take a millisecond, in which nobody else is served."""
CHUNK_BYTES = 256 * 1024
"""Encoded bytes after which one take is enough."""
CROWDED = 10_000
"""Waiting pieces from which output joins the latest piece of its own stream, wherever that stands.

Two pipes have no exact order anyway, and a cell that alternates single bytes must not cost a hundred times its output.
"""


class CappedStream:
    """Passes the first `head` bytes on, remembers the last `tail` bytes, counts what lies between."""

    def __init__(self, head: int, tail: int) -> None:
        self._head_left = head
        self._tail_cap = tail
        self._tail = bytearray()
        self.total = 0

    def feed(self, data: bytes) -> bytes:
        """The part of `data` to pass on now."""
        self.total += len(data)
        if len(data) <= self._head_left:
            self._head_left -= len(data)
            return data
        now = data[: self._head_left]
        self._tail += data[self._head_left :]
        self._head_left = 0
        # Trimmed only now and then: each byte is moved once on average.
        if len(self._tail) > 2 * self._tail_cap:
            self._trim()
        return now

    def _trim(self) -> int:
        surplus = len(self._tail) - self._tail_cap
        if surplus > 0:
            del self._tail[:surplus]
        return surplus

    def finish(self, passed: int) -> tuple[int, bytes]:
        """(bytes dropped, tail).  `passed` is how many bytes `feed` returned in all.

        If bytes were dropped the tail starts at the beginning of a line where it has one.
        """
        self._trim()
        tail, self._tail = bytes(self._tail), bytearray()
        dropped = self.total - passed - len(tail)
        if dropped:
            newline = tail.find(b"\n")
            if newline >= 0:
                dropped += newline + 1
                tail = tail[newline + 1 :]
        return dropped, tail


@dataclass
class _Raw:
    stream: str
    data: bytearray
    ts: int


@dataclass(frozen=True)
class _LineEnd:
    """The stream's unfinished line, if there is one, is an event now."""

    stream: str
    ts: int


@dataclass(frozen=True)
class _Whole:
    type: str
    data: Any
    extra: Mapping[str, Any]
    ts: int


class EventFeed:
    """What waits to be taken, in order.  `record` gets every encoded line with its `seq`."""

    def __init__(self, record: Callable[[int, bytes], None]) -> None:
        self._record = record
        self._waiting: deque[_Raw | _LineEnd | _Whole] = deque()
        self._splitters = {STDOUT: LineSplitter(), STDERR: LineSplitter()}
        self._latest: dict[str, _Raw] = {}
        self._seq = 0

    def put_raw(self, stream: str, data: bytes, ts: int) -> None:
        """Raw output.  Small pieces join what they continue."""
        latest = self._latest.get(stream)
        if latest is not None and (
            len(self._waiting) > CROWDED or (latest is self._waiting[-1] and len(latest.data) < SLICE_BYTES)
        ):
            latest.data += data
            return
        piece = _Raw(stream, bytearray(data), ts)
        self._latest[stream] = piece
        self._waiting.append(piece)

    def put_line_end(self, stream: str, ts: int) -> None:
        self._latest.pop(stream, None)
        self._waiting.append(_LineEnd(stream, ts))

    def put(self, kind: str, data: Any, ts: int, extra: Mapping[str, Any] | None = None) -> None:
        """A whole event."""
        self._waiting.append(_Whole(kind, data, extra or {}, ts))

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def clear(self) -> None:
        """Forget what waits: nobody will take it."""
        self._waiting.clear()
        self._latest.clear()

    def take(self) -> bytes:
        """Encoded lines of about CHUNK_BYTES at most (more only if one event is larger); b"" if nothing is ready."""
        parts: list[bytes] = []
        size = 0
        while self._waiting and size < CHUNK_BYTES:
            item = self._waiting.popleft()
            if isinstance(item, _Whole):
                lines = [Event(item.type, item.data, self._seq, item.ts, item.extra).to_line()]
                self._count(lines)
            else:
                lines = self._text_lines(item)
            parts += lines
            size += sum(map(len, lines))
        return b"".join(parts)

    def _text_lines(self, item: _Raw | _LineEnd) -> list[bytes]:
        splitter = self._splitters[item.stream]
        if isinstance(item, _LineEnd):
            texts = splitter.finish()
        else:
            now = bytes(item.data[:SLICE_BYTES])
            del item.data[:SLICE_BYTES]
            if item.data:
                self._waiting.appendleft(item)
            elif self._latest.get(item.stream) is item:
                del self._latest[item.stream]
            texts = splitter.feed(now)
        lines = [text_line(item.stream, text, self._seq + index, item.ts) for index, text in enumerate(texts)]
        self._count(lines)
        return lines

    def _count(self, lines: list[bytes]) -> None:
        for line in lines:
            self._record(self._seq, line)
            self._seq += 1


class ReplayBuffer:
    """The latest events of a sandbox as encoded lines, bounded in number and bytes."""

    def __init__(self, max_events: int, max_bytes: int) -> None:
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._entries: deque[tuple[int, int, bytes]] = deque()
        self._bytes = 0

    def add(self, cell_number: int, seq: int, line: bytes) -> None:
        self._entries.append((cell_number, seq, line))
        self._bytes += len(line)
        while len(self._entries) > self._max_events or (self._bytes > self._max_bytes and len(self._entries) > 1):
            self._bytes -= len(self._entries.popleft()[2])

    def lines(self) -> list[bytes]:
        """Oldest first.  By cell, because a slow client may take a cell's last events after the next cell began."""
        return [line for _, _, line in sorted(self._entries, key=lambda entry: entry[:2])]
