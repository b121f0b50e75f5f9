"""The end of what a VM's console and its VMM printed: kept in memory, for the guest may print without end."""

from __future__ import annotations

import asyncio
import socket

KEPT_BYTES = 64 * 1024
_READ_BYTES = 64 * 1024


class Console:
    """Reads one end of a socket pair on the event loop until `close`."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._kept = bytearray()
        asyncio.get_running_loop().add_reader(sock.fileno(), self._read)

    def _read(self) -> None:
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._sock.fileno())
            return
        self._kept += data
        del self._kept[:-KEPT_BYTES]

    @property
    def text(self) -> str:
        """What is kept.  Hostile: a guest wrote it."""
        return self._kept.decode("utf-8", "replace")

    @property
    def last_line(self) -> str:
        """The last line that says something, printable and short."""
        for line in reversed(self.text.splitlines()):
            clean = "".join(character for character in line if character.isprintable()).strip()
            if clean:
                return clean[:300]
        return ""

    def close(self) -> None:
        """Take what is there and stop.  Idempotent."""
        if self._sock.fileno() >= 0:
            self._read()
            asyncio.get_running_loop().remove_reader(self._sock.fileno())
            self._sock.close()
