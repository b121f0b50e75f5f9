"""Guest framing: bytes <-> frames.  Knows no message meanings.

A frame is `length:u32 | kind:u8 | channel:u32 | payload[length]`, big-endian (docs/protocol.md).
`channel` is the request id that the host chose; 0 is the machine itself.  Bytes from a guest are
hostile: the length is checked before any byte of the payload is kept.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import List, Union

from podflare.errors import ProtocolError

HEADER = struct.Struct(">IBI")

MESSAGE = 1
"""A JSON object with an `op` (wire.messages)."""
STDOUT = 2
"""Raw output bytes of the cell `channel`."""
STDERR = 3
DATA = 4
"""Raw file bytes of the transfer `channel`."""

KINDS = frozenset((MESSAGE, STDOUT, STDERR, DATA))

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
"""Cap of one MESSAGE payload: holds a rich result with images; larger ones are cut by the guest."""
MAX_DATA_BYTES = 256 * 1024
"""Cap of one STDOUT, STDERR or DATA payload: one read, so that no stream holds up the others."""


@dataclass(frozen=True)
class Frame:
    """One frame.  `payload` is bytes of at most the cap of its kind."""

    kind: int
    channel: int
    payload: bytes


def encode(kind: int, channel: int, payload: bytes) -> bytes:
    """Bytes of one frame.

    Raises: ProtocolError if the kind is unknown or the payload is above the kind's cap.
    """
    check_header(len(payload), kind)
    return HEADER.pack(len(payload), kind, channel) + payload


def check_header(length: int, kind: int) -> None:
    """Raises: ProtocolError for an unknown kind or a length above its cap."""
    if kind not in KINDS:
        raise ProtocolError(f"unknown frame kind {kind}")
    cap = MAX_MESSAGE_BYTES if kind == MESSAGE else MAX_DATA_BYTES
    if length > cap:
        raise ProtocolError(f"frame of kind {kind} has {length} bytes, the cap is {cap}")


class Decoder:
    """Turns a byte stream, cut anywhere, into frames.

    After a ProtocolError the stream has no meaning any more: the owner must drop the peer.
    Keeps at most one partial frame (cap + header) plus what one `feed` brought.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._broken = False

    def feed(self, data: Union[bytes, memoryview]) -> List[Frame]:
        """Frames completed by `data`, in order.

        Raises: ProtocolError at the first bad header, and on every call after it.
        """
        if self._broken:
            raise ProtocolError("the stream broke the protocol before")
        buffer = self._buffer
        buffer += data
        frames: List[Frame] = []
        start, size = 0, len(buffer)
        while size - start >= HEADER.size:
            length, kind, channel = HEADER.unpack_from(buffer, start)
            try:
                check_header(length, kind)
            except ProtocolError:
                self._broken = True
                raise
            end = start + HEADER.size + length
            if end > size:
                break
            frames.append(Frame(kind, channel, bytes(buffer[start + HEADER.size : end])))
            start = end
        if start:
            del buffer[:start]
        return frames

    @property
    def pending(self) -> int:
        """Bytes of an unfinished frame; not 0 at the end of the stream means it was cut."""
        return len(self._buffer)
