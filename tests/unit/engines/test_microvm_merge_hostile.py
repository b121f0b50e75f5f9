"""Promise: whatever virtual machines say in a merge is bounded, and costs that merge at most."""

from __future__ import annotations

import base64
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podflare.engines.microvm.came import Came, Coming, Piece
from podflare.engines.microvm.control import Control
from podflare.engines.microvm.diff import Entry
from podflare.engines.microvm.planned import read_plan
from podflare.engines.microvm.shipping import Merger, Sized, failure, read_contents
from podflare.errors import Conflict, MachineFailed, PodflareError, TooLarge
from podflare.guest.vm.control import Lines, encode, number_of

pytestmark = pytest.mark.anyio
ASKED = [("/root/a", 0), ("/root/b", 10)]
DATA = base64.b64encode(b"12345").decode()
json_value = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=8), inner, max_size=5)),
    max_leaves=15,
)

LIES = [
    [],
    [["/root/b", 5, 0, [], None]],
    [["/root/a", 5, 0, [[0, DATA]], None]] * 3,
    [["/root/a", 5, 0, [[1, DATA]], None]],
    [["/root/a", 2**80, 0, [], None]],
    [["/root/a", 5, 2**80, [], None]],
    [["/root/a", 5, True, [], None]],
    [["/root/a", 5, 0, [[-1, DATA]], None]],
    [["/root/a", 50, 0, [[10, DATA], [12, DATA]], None]],
    [["/root/a", 50, 0, [[0, ""]], None]],
    [["/root/a", 50, 0, [[0, "!" * 8]], None]],
    [["/root/a", 50, 0, [[0, DATA]], 3]],
    [["/root/a", 50, 0, [[0, DATA]], 51]],
    [["/root/a", 50, 0, [], 0]],
    [["/root/a", 50, 0, [], 40]],
]


@pytest.mark.parametrize("told", LIES, ids=range(len(LIES)))
def test_contents_that_cannot_be(told: Any) -> None:
    """Other files, bytes outside of a file, twice the same ones, or no end: an error, at once."""
    with pytest.raises(MachineFailed):
        read_contents(told, ASKED)


def test_contents_come_in_pieces() -> None:
    """What was told is there, what was not is asked for again, from where it ended; what changed is a conflict."""
    told = [["/root/a", 9, -5, [[0, DATA]], 7]]
    assert read_contents(told, ASKED) == (
        [Piece("/root/a", 9, -5, ((0, b"12345"),))],
        [("/root/a", 7), ("/root/b", 10)],
    )
    with pytest.raises(Conflict, match="running code"):
        read_contents([["/root/a", -1, 0, [], None]], ASKED)


@given(json_value)
def test_no_answer_passes_for_contents_or_a_plan(told: Any) -> None:
    """Any JSON is decoded within its bounds, or refused as the machine's failure."""
    for read in (lambda: read_contents(told, ASKED), lambda: read_plan(told)):
        try:
            read()
        except (MachineFailed, Conflict):
            pass
    assert isinstance(failure(told), PodflareError)


CONFLICT = {"name": "/f", "why": "w", "ours": None, "theirs": None, "version": "v", "paths": ["/f"], "if_ours": []}
PLAN = {"merged": ["/a"], "conflicts": [CONFLICT], "skipped": [["/s", "socket"]], "touched": 3}


@pytest.mark.parametrize(
    "change",
    [
        {"merged": ["a"]},
        {"merged": ["/" + "x" * 5000]},
        {"merged": ["/a\0"]},
        {"merged": [1]},
        {"touched": True},
        {"skipped": [["/s", "wall"]]},
        {"conflicts": [CONFLICT, CONFLICT]},
        {"conflicts": [{**CONFLICT, "version": "v" * 100}]},
        {"conflicts": [{**CONFLICT, "ours": {"type": "file", "size": -1}}]},
        {"conflicts": [{**CONFLICT, "theirs": {"type": "\x1b[2J"}}]},
    ],
)
def test_plans_that_cannot_be(change: dict[str, Any]) -> None:
    """A plan that names what is no path, kind or size, or one conflict twice, is refused as a whole."""
    plan, touched = read_plan(PLAN)
    assert (plan.merged, plan.skipped, touched) == (("/a",), (("/s", "socket"),), 3)
    with pytest.raises(MachineFailed):
        read_plan({**PLAN, **change})


def test_no_control_characters_from_a_machine() -> None:
    """Its words for a conflict or a failure are one line of printable text."""
    plan, _ = read_plan({**PLAN, "conflicts": [{**CONFLICT, "why": "a\x1b[2Jb\n"}]})
    assert plan.conflicts[0].why == "a?[2Jb?"
    assert str(failure({"kind": "changed", "error": "x\r\x07"})).isprintable()


async def test_no_order_is_longer_than_a_machine_takes() -> None:
    """Whatever the names and contents of files are, each line has less than the guest's cap, and all of it arrives."""
    odd = "/root/" + "\udcff" * 4000
    pieces = [Piece(f"{odd}{n}", 9, 0, ((0, b"x"),)) for n in range(200)]
    pieces += [Piece(odd, 1 << 20, 0, ((0, bytes(768 << 10)),))] * 2
    sent: list[dict[str, Any]] = []

    def answer(guest: socket.socket) -> None:
        lines = Lines()
        while data := guest.recv(1 << 18):
            for line in lines.feed(data):
                sent.append(json.loads(line))
                guest.sendall(encode(number_of(line), {}))

    engine, guest = socket.socketpair()
    engine.setblocking(False)
    with guest:
        thread = threading.Thread(target=answer, args=(guest,))
        thread.start()
        try:
            merger = Merger(Control(engine))
            await merger.write("theirs", pieces, timeout_s=30)
            await merger.put("theirs", {piece.path: Entry("file", 0o644, 9, "m") for piece in pieces}, timeout_s=30)
            await merger.check({piece.path: "m" for piece in pieces}, timeout_s=30)
            await merger.decide({piece.path: "ours" for piece in pieces}, timeout_s=30)
        finally:
            engine.close()
            thread.join()
    written = [row[0] for order in sent for row in order["merge"].get("write", {}).get("pieces", ())]
    assert len(sent) > 8 and written == [piece.path for piece in pieces]


def test_more_than_there_is_room_for() -> None:
    """Contents beyond the receiver's disk are refused before they are kept anywhere."""
    size = Sized(8)
    size.take(Piece("/a", 100, 0, ((0, b"12345"),)))
    with pytest.raises(TooLarge, match="rootfs_gb"):
        size.take(Piece("/a", 100, 0, ((5, b"12345"),)))


def test_what_came_over_is_kept_and_replaced(tmp_path: Path) -> None:
    """What a later merge says replaces what an earlier one has left; the rest is copied; a folder that was made anew
    hides what lies below it."""
    file = Entry("file", 0o644, 3, "m")
    folders = [tmp_path / name for name in ("one", "two")]
    layers = [
        {"/r/a": file, "/r/b": file, "/r/d": None, "/r/s": Entry("socket", 0o755, -1, "")},
        {"/r/b": None, "/r/d": Entry("directory", 0o755, -1, ""), "/r/d/x": file},
    ]
    contents = [[Piece("/r/a", 3, 1, ((1, b"aa"),)), Piece("/r/b", 3, 1, ())], [Piece("/r/d/x", 3, 2, ((0, b"x"),))]]
    former = None
    for folder, layer, pieces in zip(folders, layers, contents, strict=True):
        folder.mkdir()
        coming = Coming(folder)
        for piece in pieces:
            coming.add(piece)
        coming.finish(layer, former)
        coming.close()
        if former is not None:
            former.close()
        former = Came(folder)
    assert former is not None
    assert former.rows == {**layers[1], "/r/a": file} and "/r/d" in former.hides
    assert [piece.extents for piece in former.pieces("/r/a")] == [(), ((1, b"aa"),)]
    assert set(former.contents) == {"/r/a", "/r/d/x"}
    former.close()
    assert json.loads((folders[1] / "rows.json").read_text())["contents"]["/r/a"][:2] == [3, 1]
