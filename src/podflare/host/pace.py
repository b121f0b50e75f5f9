"""How fast a sandbox may print: a bucket that fills at a rate, so that one which prints without end costs its
neighbours a bounded share of the daemon's processor.  Pure: times come in.
"""

from __future__ import annotations

BURST_S = 2.0
"""So many seconds' worth may come at once, after a time of little output."""
FRAME_COST = 1024
LINE_COST = 128
"""What a piece of output, and a line that is made an event, cost besides their bytes: as much of the daemon's time."""


class Pace:
    """Of one sandbox.  What is spent beyond the bucket's content is owed, and paid back by waiting."""

    def __init__(self, rate: float) -> None:
        """Args: rate: bytes a second; 0 for no limit."""
        self._rate = rate
        self._content = rate * BURST_S
        self._at_s: float | None = None

    def spend(self, cost: int, now_s: float) -> float:
        """Seconds to wait before more is spent."""
        self._fill(now_s)
        self._content -= cost
        return self._owed_s()

    def owed_s(self, now_s: float) -> float:
        """Seconds to wait from now on."""
        self._fill(now_s)
        return self._owed_s()

    def _fill(self, now_s: float) -> None:
        passed = 0.0 if self._at_s is None else now_s - self._at_s
        self._content = min(self._content + passed * self._rate, self._rate * BURST_S)
        self._at_s = now_s

    def _owed_s(self) -> float:
        return max(0.0, -self._content / self._rate) if self._rate else 0.0
