"""Fuzz harness for the way from raw output to events: host/output.py, and the line rule of wire/events.py.

Invariant: whatever a cell writes, however it is cut and whenever it is taken, the events are one ASCII line each,
numbered from 0 without a gap, and their text is the output, cut at newlines only.
"""

from __future__ import annotations

import json
from typing import Any

from fuzzing import tries
from hypothesis import given
from hypothesis import strategies as st

from podflare.host.output import CappedStream, EventFeed, ReplayBuffer

LIGHT = tries(60)
output = st.one_of(
    st.binary(max_size=40), st.text(max_size=20).map(lambda text: text.encode("utf-8", "replace")),
    st.sampled_from([b"\n", b"\r\n", b"\n\n\n", "\u2028\u0085".encode(), b"\xff\xfe", b"x" * 40_000, b"y\n" * 9_000]),
)  # fmt: skip
streams = st.sampled_from(["stdout", "stderr"])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("raw"), streams, output),
        st.tuples(st.just("end"), streams, st.just(b"")),
        st.tuples(st.just("event"), st.sampled_from(["result", "error"]), st.text(max_size=9)),
        st.tuples(st.just("take"), st.just(""), st.just(b"")),
    ),
    max_size=20,
)


@LIGHT
@given(steps)
def test_feed(done: list[tuple[str, str, Any]]) -> None:
    """The invariant, for any order of output, line ends, events and takes."""
    recorded: list[tuple[int, bytes]] = []
    feed = EventFeed(lambda seq, line: recorded.append((seq, line)))
    expected: dict[str, list[bytes]] = {"stdout": [b""], "stderr": [b""]}
    others = []
    taken = b""
    for step, name, data in [*done, ("end", "stdout", b""), ("end", "stderr", b"")]:
        if step == "raw":
            feed.put_raw(name, data, 1)
            expected[name][-1] += data
        elif step == "end":
            feed.put_line_end(name, 1)
            expected[name].append(b"")
        elif step == "event":
            feed.put(name, data, 1)
            others.append(data)
        else:
            taken += feed.take()
    while feed:
        taken += feed.take()
    assert taken.isascii() and taken == b"".join(line for _, line in recorded)
    lines = taken.decode().splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["seq"] for event in events] == list(range(len(events))) == [seq for seq, _ in recorded]
    for name, parts in expected.items():
        told = [event["data"] for event in events if event["type"] == name]
        wanted = []
        for part in parts:
            pieces = part.split(b"\n")
            wanted += [piece.decode("utf-8", "replace") for piece in (pieces if pieces[-1] else pieces[:-1])]
        assert told == wanted
    assert [event["data"] for event in events if event["type"] in ("result", "error")] == others


@LIGHT
@given(st.lists(output, max_size=12), st.integers(0, 50), st.integers(0, 50))
def test_cap(pieces: list[bytes], head: int, tail: int) -> None:
    """Head and tail are the ends of the output, what is dropped is counted, and no more than the cap is kept."""
    stream = CappedStream(head, tail)
    passed = b"".join(stream.feed(piece) for piece in pieces)
    dropped, rest = stream.finish(len(passed))
    whole = b"".join(pieces)
    assert passed == whole[:head] and len(rest) <= tail
    assert whole.endswith(rest) and len(passed) + dropped + len(rest) == len(whole) == stream.total


@LIGHT
@given(
    st.lists(st.tuples(st.integers(0, 3), st.binary(max_size=30)), max_size=40), st.integers(1, 9), st.integers(0, 99)
)
def test_replay(entries: list[tuple[int, bytes]], most: int, most_bytes: int) -> None:
    """The buffer holds the latest lines, within both bounds but for a single line that is too long."""
    replay = ReplayBuffer(most, most_bytes)
    for seq, (cell, line) in enumerate(entries):
        replay.add(cell, seq, line)
    kept = replay.lines()
    latest = entries[len(entries) - len(kept) :]
    assert len(kept) <= most and (sum(map(len, kept)) <= most_bytes or len(kept) == 1)
    assert sorted(kept) == sorted(line for _, line in latest) and (bool(kept) or not entries)
