"""The two pipes behind file descriptors 1 and 2 of everything in the sandbox, seen from the agent.

One pair for the machine's life, shared by the REPL, its subprocesses and bash cells, so that output of C
libraries and children is caught as well.  Knows nothing of cells but what the agent tells: read for this
cell, or keep for the next one.
"""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from typing import List, Tuple

from podflare.wire import frames

KINDS = (frames.STDOUT, frames.STDERR)
READ_BYTES = 64 * 1024
KEPT_BYTES = 64 * 1024
"""Of what arrives between two cells, this much of each stream's end is kept for the next cell."""

_INT = struct.Struct("i")


class Stream:
    """One of the two pipes."""

    def __init__(self, kind: int) -> None:
        self.kind = kind
        self.read_fd, self.write_fd = os.pipe2(os.O_CLOEXEC)
        # Only the reading end: the flag of the writing end would be seen by everybody who inherits it.
        os.set_blocking(self.read_fd, False)
        self._kept = bytearray()
        self._dropped = 0

    def read(self, limit: int = READ_BYTES) -> bytes:
        """At most `limit` bytes of what is there now; b"" if there is nothing."""
        try:
            return os.read(self.read_fd, min(limit, READ_BYTES))
        except (BlockingIOError, InterruptedError):
            return b""

    def backlog(self) -> int:
        """Bytes in the pipe: everything that was written before this call and not read yet."""
        return int(_INT.unpack(fcntl.ioctl(self.read_fd, termios.FIONREAD, bytes(_INT.size)))[0])

    def keep(self, data: bytes) -> None:
        """Put aside output that belongs to no cell."""
        self._kept += data
        surplus = len(self._kept) - KEPT_BYTES
        if surplus > 0:
            del self._kept[:surplus]
            self._dropped += surplus

    def take_kept(self) -> Tuple[bytes, int]:
        """What was put aside, and how many bytes before it were dropped.  Empties the store."""
        kept, dropped = bytes(self._kept), self._dropped
        self._kept.clear()
        self._dropped = 0
        return kept, dropped


class Output:
    """Both streams."""

    def __init__(self) -> None:
        self.stdout, self.stderr = Stream(frames.STDOUT), Stream(frames.STDERR)
        self.streams = (self.stdout, self.stderr)

    def backlog(self) -> List[int]:
        return [stream.backlog() for stream in self.streams]
