"""Promise: events on the HTTP wire are lines that the real client reads, and output is cut into lines by one rule."""

from __future__ import annotations

import json

import pytest

from podflare.errors import ProtocolError
from podflare.wire.events import STDOUT, Event, LineSplitter


def test_line_holds_all_four_keys_and_survives():
    """An event's line is one ASCII line with type, data, seq and ts, and decodes to the same event."""
    event = Event("exit", 0, 3, 1776510028038, {"cell_id": "c", "reason": "ended"})
    line = event.to_line()
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert list(json.loads(line)) == ["type", "data", "seq", "ts", "cell_id", "reason"]
    assert Event.from_json(json.loads(line)) == event


@pytest.mark.parametrize(
    "text", ["\u2028", "\u2029", "\u0085", "a\nb", "\x1c\x1d\x1e\x0b\x0c", "ü\U0001f600", "\ud800"]
)
def test_no_character_breaks_a_line(text):
    """No character in an event can be taken for the end of its line by str.splitlines."""
    line = Event(STDOUT, text, 0, 0).to_line()
    assert len(line.decode("ascii").splitlines()) == 1
    assert json.loads(line)["data"] == text


@pytest.mark.parametrize("missing", ["type", "data", "seq", "ts"])
def test_event_without_a_key_is_refused(missing):
    """A line that lacks one of the four keys is a protocol error."""
    body = {"type": "stdout", "data": "", "seq": 0, "ts": 0}
    del body[missing]
    with pytest.raises(ProtocolError):
        Event.from_json(body)


@pytest.mark.parametrize(
    ("output", "lines"),
    [
        (b"", []),
        (b"84\n", ["84"]),
        (b"84", ["84"]),
        (b"a\n\n", ["a", ""]),
        (b"\n", [""]),
        (b"a\r\nb\rc\n", ["a\r", "b\rc"]),
        (b"\xff\n", ["\ufffd"]),
        ("ü\n".encode(), ["ü"]),
        (b"a\x0bb\x85c\n", ["a\x0bb\ufffdc"]),
    ],
)
def test_line_rule(output, lines):
    """Output becomes lines without their newline, split at newline only, however it is cut into pieces."""
    whole = LineSplitter()
    assert whole.feed(output) + whole.finish() == lines
    single, got = LineSplitter(), []
    for byte in output:
        got += single.feed(bytes([byte]))
    assert got + single.finish() == lines
    assert single.finish() == []


def test_unfinished_line_is_held():
    """A fragment is not given out before its newline or the end."""
    splitter = LineSplitter()
    assert splitter.feed(b"progress 1") == []
    assert splitter.feed(b" of 2") == []
    assert splitter.feed(b"\nrest") == ["progress 1 of 2"]
    assert splitter.finish() == ["rest"]
