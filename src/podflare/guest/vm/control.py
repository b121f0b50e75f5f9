"""What the engine tells the first process, one JSON object a line, and its answers.

Trusted: it comes from the engine's own daemon.  Pure but for `carry_out`.
"""

from __future__ import annotations

import json
from typing import Any, Dict, List

from podflare.guest.vm import system

MAX_LINE_BYTES = 64 * 1024


class Lines:
    """Cuts a stream into lines."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> List[bytes]:
        """Lines that are complete now.  A line above the cap is dropped, for it is no order."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            self._rest = b""
        return whole

    def forget(self) -> None:
        """The peer is gone; half a line of its has no meaning."""
        self._rest = b""


def answer(line: bytes) -> bytes:
    """Carry out one order; a line that says `{"ready": true}` or why not."""
    try:
        carry_out(json.loads(line))
        said: Dict[str, Any] = {"ready": True}
    except (ValueError, TypeError, KeyError, OSError) as exc:
        said = {"error": f"{type(exc).__name__}: {exc}"}
    return json.dumps(said).encode() + b"\n"


def carry_out(order: Dict[str, Any]) -> None:
    """`{"restored": {...}}`: this machine goes on as a copy; what must differ between copies is made different.

    Raises: OSError, or ValueError and its like for an order that makes no sense.
    """
    restored = order["restored"]
    system.set_clock(int(restored["time"]))
    system.add_entropy(bytes.fromhex(restored["seed"]))
    system.set_names(str(restored.get("hostname", "")), str(restored.get("machine_id", "")))
