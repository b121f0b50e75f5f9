"""Fuzz harness for everything that reads what a guest wrote.

Invariant: any bytes, fed at once or one at a time or cut anywhere, give the same frames, or ProtocolError at the same
place; any payload is a message or ProtocolError.  No other exception, and no more memory than one frame.
"""

from __future__ import annotations

import json
import struct
from dataclasses import fields

import pytest
from fuzzing import json_value, tries
from hypothesis import example, given
from hypothesis import strategies as st

from podflare.errors import ProtocolError
from podflare.wire import frames, messages
from podflare.wire.events import LineSplitter

LIGHT = tries(80)

good_frame = st.builds(
    frames.encode,
    st.sampled_from(sorted(frames.KINDS)),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=64),
)
header = st.builds(
    lambda length, kind, channel: struct.pack(">IBI", length, kind, channel),
    st.one_of(st.integers(0, 80), st.integers(0, 2**32 - 1)),
    st.integers(0, 255),
    st.integers(0, 2**32 - 1),
)
stream = st.lists(st.one_of(good_frame, header, st.binary(max_size=40)), max_size=8).map(b"".join)

KEYS = sorted({item.name for cls in (*messages._GUEST.values(), *messages._HOST.values()) for item in fields(cls)})
# Values that pass one check and reach the next.
likely = st.one_of(
    json_value,
    st.sampled_from(["python", "ended", "value", "missing", "too_large", "a" * 32, 1, True, "/root/f", 2**63]),
    st.lists(st.sampled_from(["x", "_y", "class", "a1", "__z__", 1]), max_size=3),
    st.dictionaries(
        st.sampled_from(["x", "y", "__z__", "not a name"]),
        st.one_of(
            st.sampled_from(["", "0" * 32, "why", 3]),
            st.tuples(st.just("int"), st.integers(-1, 2**63), st.sampled_from(["", "f" * 32]), st.just(""), st.text()),
        ),
        max_size=3,
    ),
)
OPS = sorted({*messages._GUEST, *messages._HOST})
near_message = st.builds(
    lambda op, body: {"op": op, **body},
    st.one_of(st.sampled_from(OPS), json_value),
    st.dictionaries(st.sampled_from(KEYS), likely, max_size=8),
)


def feed(pieces: list[bytes]) -> tuple[list[frames.Frame], bool]:
    """Frames that came out, and whether it ended in ProtocolError."""
    decoder, got = frames.Decoder(), []
    for piece in pieces:
        try:
            got += decoder.feed(piece)
        except ProtocolError:
            return got, True
        assert decoder.pending <= frames.MAX_MESSAGE_BYTES + frames.HEADER.size
    return got, False


@LIGHT
@given(stream, st.data())
@example(b"\0\0\0\0\0\0\0\0\0", None)
@example(struct.pack(">IBI", 2**32 - 1, 1, 0), None)
def test_decoder(data, cuts):
    """The decoder's invariant, at once, byte by byte, and cut anywhere."""
    at_once, broken = feed([data])
    single, broken_single = feed([data[i : i + 1] for i in range(len(data))])
    assert broken == broken_single
    if not broken:
        assert at_once == single
    else:
        # At once, the frames before the bad header are lost with the exception; the link is dropped anyway.
        assert at_once == []
    if cuts is not None and data:
        cut = cuts.draw(st.integers(0, len(data)))
        pieces, broken_cut = feed([data[:cut], data[cut:]])
        assert broken_cut == broken
        assert pieces == single[: len(pieces)]


@LIGHT
@given(st.one_of(st.binary(max_size=200), near_message.map(lambda body: json.dumps(body).encode())))
@pytest.mark.parametrize("decode", [messages.from_guest, messages.from_host])
def test_messages(decode, payload):
    """A payload is a message, which survives another trip, or ProtocolError."""
    try:
        message = decode(payload)
    except ProtocolError:
        return
    assert decode(messages.to_payload(message)) == message


@LIGHT
@given(st.lists(st.binary(max_size=30), max_size=10))
def test_lines(pieces):
    """Lines joined by newline are the bytes again (as replaced UTF-8), whatever the pieces."""
    splitter = LineSplitter()
    lines = [line for piece in pieces for line in splitter.feed(piece)] + splitter.finish()
    data = b"".join(pieces)
    expected = [part.decode("utf-8", "replace") for part in data.split(b"\n")]
    if expected[-1] == "":
        expected.pop()
    assert lines == expected
