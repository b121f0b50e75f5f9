"""One framed byte channel with a buffer for what could not be sent yet.

Owns one end of a connected stream: a socket, or a character device that works like one.  Knows frames, not messages.
The buffer is bounded by its users: they look at `full` before they take in more to send.
"""

from __future__ import annotations

import os
from collections import deque
from itertools import islice
from typing import Deque, List, Optional, Protocol

from podflare.wire import frames

HIGH_WATER = 1024 * 1024
"""Queued bytes from which nothing more should be read for this channel."""
_RECEIVE_BYTES = frames.MAX_DATA_BYTES
_GATHER = 16
"""Frames that one system call takes at most."""


class Connection(Protocol):
    """One end; owned by its link."""

    def fileno(self) -> int: ...

    def close(self) -> None: ...


class Descriptor:
    """A stream of which only the descriptor is known."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class TokenSearch:
    """Drops a stream up to a token, wherever it is cut into pieces."""

    def __init__(self, token: bytes) -> None:
        self._token = token
        self._tail = b""

    def feed(self, data: bytes) -> Optional[bytes]:
        """What follows the token; None as long as it has not come."""
        self._tail += data
        at = self._tail.find(self._token)
        if at >= 0:
            return self._tail[at + len(self._token) :]
        self._tail = self._tail[max(0, len(self._tail) - len(self._token) + 1) :]
        return None


class Link:
    """Sends at once what the kernel takes, keeps the rest in order."""

    def __init__(self, sock: Connection, *, token: bytes = b"") -> None:
        """Args: token: bytes of a former conversation come first in both directions; it stands between."""
        os.set_blocking(sock.fileno(), False)
        self.sock = sock
        self.queued = len(token)
        self._search = TokenSearch(token) if token else None
        self._decoder = frames.Decoder()
        self._waiting: Deque[memoryview] = deque([memoryview(token)] if token else ())
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
            size = os.readv(self.sock.fileno(), [self._inbox])
        except (BlockingIOError, InterruptedError):
            return []
        except OSError as exc:
            raise EOFError(str(exc)) from exc
        if not size:
            raise EOFError("end of stream")
        if self._search is None:
            return self._decoder.feed(self._inbox[:size])
        rest = self._search.feed(bytes(self._inbox[:size]))
        if rest is None:
            return []
        self._search = None
        return self._decoder.feed(rest)

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
                sent = os.writev(self.sock.fileno(), tuple(islice(waiting, _GATHER)))
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
