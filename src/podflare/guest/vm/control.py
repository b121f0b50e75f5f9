"""What the engine tells the first process, one JSON object a line, and the answers: pure.

Trusted: it comes from the engine's own daemon.  An answer carries the number of its order.
"""

from __future__ import annotations

import json
from typing import Any, Dict, List

MAX_LINE_BYTES = 2 << 20
"""Of an order: a part of a merge brings contents of files along."""

MERGE, END_OF_MERGE = b'{"merge": {', b'{"merge": {"end"'
"""How the lines of orders of a merge begin."""


class Lines:
    """Cuts a stream into lines."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> List[bytes]:
        """Lines that are complete now.  A line above the cap is dropped, for it is no order."""
        if b"\n" not in data:
            self._rest += data
            whole: List[bytes] = []
        else:
            *whole, rest = (bytes(self._rest) + data).split(b"\n")
            self._rest = bytearray(rest)
        if len(self._rest) > MAX_LINE_BYTES:
            self._rest = bytearray()
        return whole

    def forget(self) -> None:
        """The peer is gone; half a line of its has no meaning."""
        self._rest = bytearray()


def number_of(line: bytes) -> int:
    """Of an order whose number comes last.  Raises: ValueError."""
    return int(line.rpartition(b" ")[2].rstrip(b"}"))


def encode(number: Any, body: Dict[str, Any]) -> bytes:
    """The line of an answer."""
    return json.dumps({**body, "order": number}).encode() + b"\n"
