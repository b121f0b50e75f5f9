"""Fuzz harness for everything that reads what a guest wrote.

Invariant: any bytes, fed at once or one at a time or cut anywhere, give the same frames, or ProtocolError at the same
place; any payload is a message or ProtocolError.  No other exception, and no more memory than one frame.

By hand, for longer: HYPOTHESIS_MAX_EXAMPLES=100000 .venv/bin/python -m pytest tests/fuzz/test_frames.py
"""

from __future__ import annotations

import json
import os
import struct

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from podflare.errors import ProtocolError
from podflare.wire import frames, messages
from podflare.wire.events import LineSplitter

EXAMPLES = int(os.environ.get("HYPOTHESIS_MAX_EXAMPLES", "300"))
LIGHT = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])

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

json_value = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=12,
)
KEYS = ["code", "reason", "restarted", "signal", "data", "kind", "name", "value", "traceback", "size", "bytes", "path",
        "language", "protocol", "python", "message"]  # fmt: skip
OPS = sorted({*messages._GUEST, *messages._HOST})
near_message = st.builds(
    lambda op, body: {"op": op, **body},
    st.one_of(st.sampled_from(OPS), json_value),
    st.dictionaries(st.sampled_from(KEYS), json_value, max_size=5),
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
