"""The network of one machine, as the gate holds it: descriptors, policy, journal.  Ends with `aclose`."""

from __future__ import annotations

import os
import time

from podflare.egress.journal import Journal


class Outlet:
    """Everything that the gate has of one machine."""

    def __init__(self, tun: int, listener: int, table: int) -> None:
        self._fds = [tun, listener, table]
        self.journal = Journal(time.time)

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
