"""What a cell emits on the HTTP wire: the one definition of each event, and the line rule (spec A.3).

An event line carries all of `type, data, seq, ts`, because the real client reads each of them; what we add
travels as further keys, which it ignores.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as _quote
from typing import Any, Dict, List, Mapping

from podflare.errors import ProtocolError

STDOUT = "stdout"
STDERR = "stderr"
RESULT = "result"
"""`data` is a mime type -> data object; key `kind` is `value` or `display`."""
ERROR = "error"
"""`data` is {name, value, traceback}."""
TOOL_CALL = "tool_call"
"""The code calls a function of the caller; `data` is {call_id, name, input}, further key `cell_id`."""
TOOL_CANCELLED = "tool_cancelled"
"""Nobody waits for this call's answer any more; `data` is {call_id, reason}, reason: cancelled | timed_out."""
WARNING = "warning"
"""The sandbox ends soon; `data` is {kind: "ending", message, seconds_left, ends_at_ms}."""
EXIT = "exit"
"""Always last; `data` is the exit code.  Further keys: EXIT_KEYS."""

EXIT_TIMED_OUT = 124
EXIT_INTERRUPTED = 130
EXIT_KILLED = 137

EXIT_KEYS = ("cell_id", "duration_ms", "reason", "restarted", "stdout_dropped_bytes", "stderr_dropped_bytes")
"""reason: ended | interrupted | timed_out | died | out_of_memory | disconnected | sandbox_failed."""

HEARTBEAT = b"\n"
"""An empty line: legal filler that the real client skips."""


@dataclass(frozen=True)
class Event:
    """One event of a cell.  `seq` counts from 0 within the cell, `ts` is wall clock in ms since the epoch."""

    type: str
    data: Any
    seq: int
    ts: int
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_line(self) -> bytes:
        """The NDJSON line, ASCII, with its newline."""
        body: Dict[str, Any] = {"type": self.type, "data": self.data, "seq": self.seq, "ts": self.ts}
        body.update(self.extra)
        return (json.dumps(body, ensure_ascii=True, separators=(",", ":")) + "\n").encode("ascii")

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "Event":
        """Raises: ProtocolError if one of the four keys is missing."""
        try:
            known = {key: body[key] for key in ("type", "data", "seq", "ts")}
        except (KeyError, TypeError) as exc:
            raise ProtocolError(f"event without {exc}: {body!r:.200}") from exc
        return cls(extra={key: value for key, value in body.items() if key not in known}, **known)


def text_line(kind: str, text: str, seq: int, ts: int) -> bytes:
    """`Event(kind, text, seq, ts).to_line()` for a plain text event, without its cost: one call a line of output."""
    return f'{{"type":"{kind}","data":{_quote(text)},"seq":{seq},"ts":{ts}}}\n'.encode("ascii")


class LineSplitter:
    """Bytes of one stream -> `data` of its events, by the line rule.

    One entry a line, without its newline; an unfinished line is held until newline or `finish`, however long
    (the caller caps the bytes it feeds).  Split at `\\n` only, every `\\r` kept, invalid UTF-8 replaced.
    """

    def __init__(self) -> None:
        self._partial: List[bytes] = []

    def feed(self, data: bytes) -> List[str]:
        """Lines completed by `data`."""
        head, newline, rest = data.partition(b"\n")
        if not newline:
            if data:
                self._partial.append(data)
            return []
        self._partial.append(head)
        lines = [b"".join(self._partial)]
        lines += rest.split(b"\n")
        tail = lines.pop()
        self._partial = [tail] if tail else []
        return [line.decode("utf-8", "replace") for line in lines]

    def finish(self) -> List[str]:
        """The unfinished last line, if there is one."""
        rest, self._partial = b"".join(self._partial), []
        return [rest.decode("utf-8", "replace")] if rest else []
