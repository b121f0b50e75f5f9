"""Promise: whatever a VM says to its engine costs that VM at most."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from podflare.engines.base import Limits, MachineSpec
from podflare.engines.linux.waiting import to_the_end
from podflare.engines.microvm import control, saved
from podflare.engines.microvm.console import KEPT_BYTES, Console
from podflare.engines.microvm.control import Control
from podflare.engines.microvm.diff import read_row
from podflare.engines.microvm.vmm import Shape
from podflare.engines.snapshots import SnapshotStore
from podflare.errors import Conflict, DeadlineExceeded, MachineFailed

pytestmark = pytest.mark.anyio


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The engine's end of a port, and the guest's."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


JUNK = [b"\n", b"[]\n", b"nonsense\n", b"[" * 100_000 + b"\n", b'{"failed": {}}\n']


@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
async def test_answers_that_are_none(pair: tuple[socket.socket, socket.socket], junk: bytes) -> None:
    """What is no answer to the order is an error of that machine, or is waited past until the time is over."""
    pair[1].sendall(junk)
    with pytest.raises((MachineFailed, DeadlineExceeded)):
        await Control(pair[0]).ask({"usage": True}, timeout_s=0.2)


async def test_stale_answers_are_skipped(pair: tuple[socket.socket, socket.socket]) -> None:
    """The answer to an order that was given up is not taken for that to the next one."""
    conversation = Control(pair[0])
    with pytest.raises(DeadlineExceeded):
        await conversation.ask({"usage": True}, timeout_s=0.05)
    first = int(json.loads(pair[1].recv(4096))["order"])
    for number in (1, 2):
        pair[1].sendall(json.dumps({"order": first + number - 1, "usage": number}).encode() + b"\n")
    assert (await conversation.ask({"usage": True}, timeout_s=5))["usage"] == 2


async def test_a_conversation_moves_to_another_socket(pair: tuple[socket.socket, socket.socket]) -> None:
    """After a cut anywhere: half a line, an answer to nobody and bytes that are none are passed over, once."""
    conversation = Control(pair[0])
    with pytest.raises(DeadlineExceeded):
        await conversation.ask({"usage": True}, timeout_s=0.05)
    first = int(json.loads(pair[1].recv(4096))["order"])
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        async with conversation.quiet():
            conversation.move(ours)
        theirs.sendall(b'half of an answer"}\n\xff\n[1]\n{"order": null}\n')
        theirs.sendall(json.dumps({"order": first + 1, "usage": 7}).encode() + b"\n")
        assert (await conversation.ask({"usage": True}, timeout_s=5))["usage"] == 7
        assert theirs.recv(4096).startswith(b"\n{")  # what the guest had of an order ends here
        theirs.sendall(b"nonsense\n")
        with pytest.raises(MachineFailed, match="no answer"):
            await conversation.ask({"usage": True}, timeout_s=5)


async def test_a_line_without_end(pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that never ends is given up at the cap."""
    monkeypatch.setattr(control, "MAX_LINE_BYTES", 100_000)
    pair[1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    pair[1].sendall(b"x" * 150_000)
    with pytest.raises(MachineFailed, match="without end"):
        await Control(pair[0]).ask({"usage": True}, timeout_s=5)


async def test_what_follows_the_token_stays(pair: tuple[socket.socket, socket.socket]) -> None:
    """Of a restored machine's channel everything up to the token is dropped, and not a byte behind it."""
    token = b"t" * 31 + b"!"
    pair[1].sendall(b"half a frame" + b"t" * 40 + token + b"Ready")
    await control._skip_to(pair[0], token, anyio.current_time() + 1e9)
    assert pair[0].recv(100) == b"Ready"


async def test_a_channel_without_token(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that floods instead of beginning anew is given up at the cap."""
    monkeypatch.setattr(control, "MAX_STALE_BYTES", 50_000)
    pair[1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    pair[1].sendall(b"x" * 100_000)
    with pytest.raises(MachineFailed, match="did not begin anew"):
        await control._skip_to(pair[0], b"t" * 32, anyio.current_time() + 1e9)


async def test_a_console_keeps_its_end(pair: tuple[socket.socket, socket.socket]) -> None:
    """However much a guest prints, the end is kept, and what is told of it is printable."""
    console = Console(pair[0])
    for _ in range(20):
        pair[1].sendall(b"." * 10_000 + b"\n")
        await anyio.sleep(0)
    pair[1].sendall(b"last \x1b[2J words\n\n")
    with anyio.fail_after(20):
        while "words" not in console.text:
            await anyio.wait_all_tasks_blocked()
    assert len(console.text) <= KEPT_BYTES
    assert console.last_line == "last [2J words"
    console.close()
    console.close()


ROW: list[Any] = ["/root/f", "file", 0o644, 3, "00"]
BAD: list[Any] = [None, [], ROW[:4], ["f", *ROW[1:]], ["/a\0", *ROW[1:]], ["/f", "thing", *ROW[2:]]]
BAD += [[*ROW[:2], mode, 3, ""] for mode in (-1, 0o10000, True, "0")] + [[*ROW[:3], -2, ""], [*ROW[:4], 5]]


@pytest.mark.parametrize("row", BAD, ids=range(len(BAD)))
def test_rows_that_cannot_be(row: object) -> None:
    """A row of a machine's files that is not exactly one is refused."""
    assert read_row(ROW)[0] == "/root/f"
    with pytest.raises(MachineFailed):
        read_row(row)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=6)))
def test_any_row_is_an_entry_or_one_kind_of_error(row: object) -> None:
    """Nothing else than MachineFailed comes out of decoding a row."""
    try:
        read_row(row)
    except MachineFailed:
        pass


def test_snapshots_of_another_hypervisor(tmp_path: Path) -> None:
    """What was kept goes on under the same hypervisor alone; the image's root is linked, and not counted as its own."""
    (tmp_path / "root").write_bytes(b"r" * 100_000)
    store, shape = SnapshotStore(str(tmp_path / "kept"), tmp_path), Shape(1 << 30, 1)
    spec = MachineSpec("default", Limits(1 << 30, 1 << 30))
    for name in ("good", "bad"):
        with store.keeping(name) as keeping:
            origin = saved.begin(keeping, tmp_path / "root", shape)
            origin.disk.write_bytes(b"d")
            keeping.publish(spec, {}, saved.more(origin, "key") if name == "good" else {})
    kept = store.get("good")
    assert saved.origin_of(kept, "key").shape == shape and saved.origin_of(kept, "key").root.stat().st_nlink == 3
    assert kept.about.size_bytes < 100_000
    with pytest.raises(Conflict, match="hypervisor"):
        saved.origin_of(kept, "other")
    with pytest.raises(MachineFailed, match="'bad' cannot be used"):
        saved.origin_of(store.get("bad"), "key")


async def test_what_runs_to_the_end_is_waited_for() -> None:
    """Work that runs to its end is over when its cancelled caller goes on."""
    ended = []

    async def work() -> None:
        await anyio.sleep(0.05)
        ended.append(True)

    with anyio.move_on_after(0.01) as scope:
        await to_the_end(work())
    assert scope.cancelled_caught and ended == [True]
