"""What a client sees of a cell's output, and what is kept of it."""

from __future__ import annotations

import json
import os

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from podflare.host.cells import Cell, Ending, check_fits, judge
from podflare.host.config import Config
from podflare.host.kept import BACKLOG_BYTES, MEMORY_BYTES, KeptOutput, Room, SharedRoom
from podflare.host.output import CROWDED, SLICE_BYTES, CappedStream, EventFeed, ReplayBuffer
from podflare.wire.api import ExecRequest
from podflare.wire.events import Event, LineSplitter, text_line
from podflare.wire.messages import Exit


def feed() -> tuple[EventFeed, list[bytes]]:
    recorded: list[bytes] = []
    return EventFeed(lambda seq, line: recorded.append(line)), recorded


def take_all(source: EventFeed) -> list[dict]:
    parts = b""
    while source:
        parts += source.take()
    return [json.loads(line) for line in parts.splitlines()]


@given(st.lists(st.binary(max_size=50)), st.integers(0, 60), st.integers(0, 60))
def test_cap_keeps_head_and_tail_and_counts_the_rest(pieces, head, tail):
    """Whatever arrives however cut: beginning and end are kept in their places and every byte is accounted for."""
    cap = CappedStream(head, tail)
    passed = b"".join(cap.feed(piece) for piece in pieces)
    whole = b"".join(pieces)
    dropped, rest = cap.finish(len(passed))
    assert passed == whole[:head]
    assert whole.endswith(rest) and len(rest) <= tail
    assert len(passed) + dropped + len(rest) == len(whole)
    if not dropped:
        assert passed + rest == whole


def test_cap_holds_no_more_than_twice_its_tail():
    """An endless stream costs the tail, not its length."""
    cap = CappedStream(0, 1000)
    for _ in range(10_000):
        cap.feed(b"x" * 100)
        assert len(cap._tail) <= 2100


@given(st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), st.binary(max_size=40))))
def test_feed_gives_the_lines_of_each_stream_in_order(pieces):
    """However output is cut into pieces, each stream's events are its lines; seq counts without a gap."""
    source, recorded = feed()
    for stream, data in pieces:
        source.put_raw(stream, data, 1)
    for stream in ("stdout", "stderr"):
        source.put_line_end(stream, 2)
    got = take_all(source)
    for stream in ("stdout", "stderr"):
        splitter = LineSplitter()
        expected = splitter.feed(b"".join(data for name, data in pieces if name == stream)) + splitter.finish()
        assert [event["data"] for event in got if event["type"] == stream] == expected
    assert [event["seq"] for event in got] == list(range(len(got))) and len(recorded) == len(got)


def test_one_take_is_bounded():
    """A flood of empty lines is taken in chunks, not as one giant answer."""
    source, _ = feed()
    source.put_raw("stdout", b"\n" * 4_000_000, 1)
    assert len(source.take()) < 3_000_000 and source


def test_alternating_single_bytes_do_not_pile_up():
    """Two streams that take turns byte by byte occupy a bounded number of pieces."""
    source, _ = feed()
    for _ in range(3 * CROWDED):
        source.put_raw("stdout", b"a", 1)
        source.put_raw("stderr", b"b", 1)
    assert len(source._waiting) <= CROWDED + 2
    source.put_line_end("stdout", 1)
    source.put_line_end("stderr", 1)
    got = take_all(source)
    assert [len(event["data"]) for event in got] == [3 * CROWDED] * 2


@given(st.text(), st.integers(0, 2**40), st.integers(0, 2**50))
def test_quick_line_equals_the_event(text, seq, ts):
    """The quick encoder of text lines gives the very bytes of the event's definition."""
    assert text_line("stdout", text, seq, ts) == Event("stdout", text, seq, ts).to_line()


def test_replay_is_bounded_in_events_and_bytes():
    """The buffer keeps the latest events within both caps, ordered by cell even if added late."""
    replay = ReplayBuffer(3, 100)
    for number in range(5):
        replay.add(number, 0, b"x%d" % number)
    replay.add(3, 1, b"late")
    assert replay.lines() == [b"x3", b"late", b"x4"]
    replay.add(5, 0, b"y" * 99)
    assert replay.lines() == [b"y" * 99]
    replay.add(6, 0, b"z" * 500)
    assert replay.lines() == [b"z" * 500]


# Kept output.


async def collect(kept: KeptOutput) -> bytes:
    return b"".join([piece async for piece in kept.read()])


def make(directory, size=10**9, hold=lambda stop: None) -> KeptOutput:
    return KeptOutput(directory, (Room(size),), hold)


@pytest.mark.anyio
async def test_small_output_makes_no_file(tmp_path):
    """Output of ordinary size stays in memory."""
    kept = make(tmp_path / "missing")
    kept.append(b"a" * MEMORY_BYTES)
    assert await collect(kept) == b"a" * MEMORY_BYTES
    kept.close()


@pytest.mark.anyio
async def test_large_output_is_whole_and_leaves_no_name(tmp_path):
    """Large output goes to a file without a name and reads back whole, also while it still grows."""
    kept = make(tmp_path)
    content = os.urandom(300_000)
    for start in range(0, len(content), 7001):
        kept.append(content[start : start + 7001])
    assert await collect(kept) == content
    kept.append(b"more" * 50_000)
    assert await collect(kept) == content + b"more" * 50_000
    assert os.listdir(tmp_path) == []
    kept.close()


@pytest.mark.anyio
async def test_room_is_shared_and_given_back(tmp_path):
    """What exceeds the room is not kept and marked as cut; closing gives the room to others."""
    room = Room(100_000)
    first, second = (KeptOutput(tmp_path, (Room(10**9), room), lambda stop: None) for _ in range(2))
    first.append(b"a" * 80_000)
    second.append(b"b" * 80_000)
    assert (first.cut, second.cut, second.kept, room.left) == (False, True, 20_000, 0)
    second.append(b"c")
    assert await collect(second) == b"b" * 20_000
    first.close()
    assert room.left == 80_000
    second.close()
    second.close()
    assert room.left == 100_000


def test_sandbox_drops_its_oldest_output_first():
    """A sandbox at its own cap makes room from what it kept longest; the daemon's cap is not passed either way."""
    total = Room(150)
    dropped = []

    def drop() -> bool:
        if dropped:
            return False
        dropped.append(1)
        own.give_back(60)
        return True

    own = SharedRoom(100, total, drop)
    assert own.take(60) == 60 and total.left == 90
    assert own.take(60) == 60 and dropped == [1]
    assert own.take(60) == 40 and total.left == 50


@pytest.mark.anyio
async def test_disk_that_fails_ends_the_keeping_only(tmp_path):
    """If the file cannot be written the output is marked as cut and what memory held is readable."""
    kept = make(tmp_path / "missing")
    kept.append(b"a" * 1000)
    kept.append(b"b" * MEMORY_BYTES)
    assert await collect(kept) == b"a" * 1000 and kept.cut
    kept.append(b"more")
    kept.close()


@pytest.mark.anyio
async def test_slow_disk_holds_the_source(tmp_path):
    """More waiting for the disk than the backlog stops the source until it is written."""
    holds: list[bool] = []
    kept = make(tmp_path, hold=holds.append)
    kept.append(b"a" * MEMORY_BYTES + b"b")
    kept.append(b"c" * BACKLOG_BYTES)
    assert holds == [True]
    assert len(await collect(kept)) == MEMORY_BYTES + 1 + BACKLOG_BYTES
    assert holds == [True, False]
    kept.close()


@pytest.mark.anyio
async def test_close_while_reading(tmp_path):
    """Closing under a reader ends the reading; the descriptor is not closed under it."""
    kept = make(tmp_path)
    kept.append(b"a" * 3_000_000)
    pieces = kept.read()
    assert len(await anext(pieces)) > 0
    kept.close()
    assert [piece async for piece in pieces] == []
    await anyio.sleep(0)
    assert kept._file == -1


# Judging the end.


class _Stopped:
    """A cell as `judge` sees it."""

    def __init__(self, stopping: str, language: str = "python") -> None:
        self.stopping = stopping
        self.request = ExecRequest("x", language, timeout_seconds=2)


@pytest.mark.parametrize(
    ("stopping", "said", "oom", "code", "reason", "note"),
    [
        ("", Exit(0), "", 0, "ended", ""),
        ("", Exit(3), "", 3, "ended", ""),
        ("", Exit(130, "interrupted"), "", 130, "interrupted", ""),
        ("", Exit(139, "died", True, 11), "", 139, "died", ""),
        ("", Exit(137, "died", True, 9), "out of memory: x", 137, "out_of_memory", "variables are lost"),
        ("", Exit(137, "died", False, 9), "out of memory: x", 137, "out_of_memory", "the shell or a process of it"),
        ("", Exit(0), "out of memory: x", 0, "ended", "out of memory: x"),
        ("", Exit(137), "out of memory: x", 137, "out_of_memory", "out of memory: x"),
        ("timed_out", Exit(130, "interrupted"), "", 124, "timed_out", "after 2 s; variables are kept"),
        ("timed_out", Exit(0), "", 124, "timed_out", "variables are kept"),
        ("timed_out", Exit(137, "died", True, 9), "", 124, "timed_out", "variables are lost"),
        ("interrupted", Exit(130, "interrupted"), "", 130, "interrupted", ""),
        ("interrupted", Exit(0), "", 0, "ended", ""),
        ("interrupted", Exit(137, "died", True, 9), "", 137, "interrupted", "variables are lost"),
        ("disconnected", Exit(130, "interrupted"), "", 130, "disconnected", ""),
    ],
)
def test_judgement(stopping, said, oom, code, reason, note):
    """What the guest says, what the host did and what the kernel did give one exit code, one reason and one remark."""
    ending = judge(_Stopped(stopping), said, oom)
    assert (ending.code, ending.reason, ending.restarted) == (code, reason, said.restarted)
    assert note in " ".join(ending.notes) if note else ending.notes == ()


def test_code_that_fits_is_not_refused():
    """Only what no frame holds is too large: escapes count, not characters."""
    check_fits(ExecRequest("x" * 8_000_000))
    with pytest.raises(ValueError):
        check_fits(ExecRequest("é" * 3_000_000))


def test_slices_are_smaller_than_a_chunk():
    """Turning raw bytes into lines stays a short piece of work: one slice of empty lines is about a megabyte."""
    source, _ = feed()
    source.put_raw("stdout", b"\n" * SLICE_BYTES, 10**12)
    assert len(source.take()) < 2 * 2**20


def test_cell_never_started_ends_cleanly(tmp_path):
    """A cell that ends before it ran has one exit event and no duration."""

    class Around:
        id = "sbx_x"
        config = Config()
        replay = ReplayBuffer(10, 1000)

    cell = Cell(1, "cell_1", ExecRequest("x"), Around(), tmp_path, Room(100))
    cell.finish(Ending(137, "sandbox_failed", notes=("why",)))
    cell.finish(Ending(0, "ended"))
    lines = [json.loads(line) for line in Around.replay.lines()]
    assert lines == []  # nobody took them yet
    assert cell.over and cell.duration_s == 0
