"""Promise: frames survive any cut of the byte stream, and a bad header is found before its payload is kept."""

from __future__ import annotations

import struct

import pytest

from podflare.errors import ProtocolError
from podflare.wire import frames
from podflare.wire.frames import Decoder, Frame, encode

SAMPLES = [
    Frame(frames.MESSAGE, 0, b'{"op":"x"}'),
    Frame(frames.STDOUT, 1, b""),
    Frame(frames.STDERR, 2**32 - 1, bytes(range(256))),
    Frame(frames.DATA, 7, b"d" * frames.MAX_DATA_BYTES),
]
STREAM = b"".join(encode(frame.kind, frame.channel, frame.payload) for frame in SAMPLES)


@pytest.mark.parametrize("step", [1, 8, 9, 10, 4096, len(STREAM)])
def test_any_cut_gives_the_same_frames(step):
    """The decoder gives the same frames however the stream is cut, and keeps nothing back at the end."""
    decoder, got = Decoder(), []
    for start in range(0, len(STREAM), step):
        got += decoder.feed(STREAM[start : start + step])
    assert got == SAMPLES
    assert decoder.pending == 0


def test_unfinished_frame_is_pending():
    """A stream that ends within a frame is seen by `pending`."""
    decoder = Decoder()
    assert decoder.feed(STREAM[:5]) == []
    assert decoder.pending == 5


@pytest.mark.parametrize(
    ("length", "kind"),
    [(0, 0), (0, 5), (0, 255), (frames.MAX_MESSAGE_BYTES + 1, 1), (frames.MAX_DATA_BYTES + 1, 2), (2**32 - 1, 4)],
)
def test_bad_header_is_refused_at_once(length, kind):
    """An unknown kind or a length above its cap is refused with the header alone, and for ever after."""
    decoder = Decoder()
    with pytest.raises(ProtocolError):
        decoder.feed(struct.pack(">IBI", length, kind, 1))
    with pytest.raises(ProtocolError):
        decoder.feed(STREAM)


def test_encoder_keeps_the_same_caps():
    """What the decoder would refuse is refused when it is encoded."""
    encode(frames.STDOUT, 1, bytes(frames.MAX_DATA_BYTES))
    with pytest.raises(ProtocolError):
        encode(frames.STDOUT, 1, bytes(frames.MAX_DATA_BYTES + 1))
    with pytest.raises(ProtocolError):
        encode(9, 1, b"")


def test_payload_is_independent_of_the_buffer():
    """A frame's payload stays as it was when the fed buffer is used again."""
    buffer = bytearray(encode(frames.STDOUT, 1, b"first"))
    decoder = Decoder()
    [frame] = decoder.feed(memoryview(buffer))
    buffer[:] = bytes(len(buffer))
    assert frame.payload == b"first"
