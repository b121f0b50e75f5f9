"""One framed byte channel with a buffer for what could not be sent yet.

Owns a connected, non-blocking stream socket.  Knows frames, not messages.  The buffer is bounded by its
users: they look at `full` before they take in more to send.
"""

from __future__ import annotations

import socket
from collections import deque
from itertools import islice
from typing import Deque, List

from podflare.wire import frames

HIGH_WATER = 1024 * 1024
"""Queued bytes from which nothing more should be read for this channel."""
_RECEIVE_BYTES = frames.MAX_DATA_BYTES
_GATHER = 16
"""Frames that one system call takes at most."""


class Link:
    """Sends at once what the kernel takes, keeps the rest in order."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.queued = 0
        self._decoder = frames.Decoder()
        self._waiting: Deque[memoryview] = deque()
        # Kept, for a fresh buffer of this size means two system calls to map and unmap it at each call.
        self._inbox = memoryview(bytearray(_RECEIVE_BYTES))

    @property
    def full(self) -> bool:
        return self.queued >= HIGH_WATER

    def receive(self) -> List[frames.Frame]:
        """Frames that are complete now; [] if there is nothing to read.

        Raises: EOFError at the end of the stream or when the peer is gone; ProtocolError for bytes that are no frames.
        """
        try:
            size = self.sock.recv_into(self._inbox)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError as exc:
            raise EOFError(str(exc)) from exc
        if not size:
            raise EOFError("end of stream")
        return self._decoder.feed(self._inbox[:size])

    def send(self, kind: int, channel: int, payload: bytes) -> None:
        """Send or queue one frame.  A peer that is gone is noticed by `receive`, not here."""
        self.post(kind, channel, payload)
        if len(self._waiting) == 1:
            self.flush()

    def post(self, kind: int, channel: int, payload: bytes) -> None:
        """Queue one frame for the next `flush`: what belongs together wakes the peer once."""
        data = frames.encode(kind, channel, payload)
        self._waiting.append(memoryview(data))
        self.queued += len(data)

    def flush(self) -> None:
        """Send what the kernel takes now."""
        waiting = self._waiting
        try:
            while waiting:
                sent = self.sock.sendmsg(tuple(islice(waiting, _GATHER)))
                self.queued -= sent
                while waiting and sent >= len(waiting[0]):
                    sent -= len(waiting.popleft())
                if sent:
                    waiting[0] = waiting[0][sent:]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            # The peer is gone; `receive` reports it as the end of the stream.
            waiting.clear()
            self.queued = 0
