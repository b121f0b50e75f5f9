"""One framed byte channel with a buffer for what could not be sent yet.

Owns a connected, non-blocking stream socket.  Knows frames, not messages.  The buffer is bounded by its
users: they look at `full` before they take in more to send.
"""

from __future__ import annotations

import socket
from collections import deque
from typing import Deque, List

from podflare.wire import frames

HIGH_WATER = 1024 * 1024
"""Queued bytes from which nothing more should be read for this channel."""
RECEIVE_BYTES = frames.MAX_DATA_BYTES


class Link:
    """Sends at once what the kernel takes, keeps the rest in order."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.queued = 0
        self._decoder = frames.Decoder()
        self._waiting: Deque[memoryview] = deque()

    @property
    def full(self) -> bool:
        return self.queued >= HIGH_WATER

    def receive(self) -> List[frames.Frame]:
        """Frames that are complete now; [] if there is nothing to read.

        Raises: EOFError at the end of the stream or when the peer is gone; ProtocolError for bytes that are no frames.
        """
        try:
            data = self.sock.recv(RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError as exc:
            raise EOFError(str(exc)) from exc
        if not data:
            raise EOFError("end of stream")
        return self._decoder.feed(data)

    def send(self, kind: int, channel: int, payload: bytes) -> None:
        """Send or queue one frame.  A peer that is gone is noticed by `receive`, not here."""
        data = frames.encode(kind, channel, payload)
        self._waiting.append(memoryview(data))
        self.queued += len(data)
        if len(self._waiting) == 1:
            self.flush()

    def flush(self) -> None:
        """Send what the kernel takes now."""
        waiting = self._waiting
        try:
            while waiting:
                sent = self.sock.send(waiting[0])
                self.queued -= sent
                if sent < len(waiting[0]):
                    waiting[0] = waiting[0][sent:]
                    return
                waiting.popleft()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            # The peer is gone; `receive` reports it as the end of the stream.
            waiting.clear()
            self.queued = 0
