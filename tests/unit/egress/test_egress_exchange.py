"""HTTP between two hostile sides, without sockets: whatever they send, an exchange ends, and raises nothing.

Invariant for any bytes of client and server, cut anywhere: `run` returns, everything sent to the client begins with an
HTTP status line, and nothing is sent to a server but what was parsed as a request.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import anyio
import h11
import pytest
from anyio.abc import ByteStream
from hypothesis import given, settings
from hypothesis import strategies as st

from podflare.egress.exchange import Denied, Exchange

pytestmark = pytest.mark.anyio


class Scripted(ByteStream):
    """A stream that says what it was given, in pieces of a size, then ends; and keeps what it was sent."""

    def __init__(self, data: bytes, piece: int) -> None:
        self._data, self._piece = data, piece
        self.sent = b""

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await anyio.lowlevel.checkpoint()
        if not self._data:
            raise anyio.EndOfStream
        part, self._data = self._data[: self._piece], self._data[self._piece :]
        return part

    async def send(self, item: bytes) -> None:
        await anyio.lowlevel.checkpoint()
        self.sent += item

    async def send_eof(self) -> None:
        pass

    async def aclose(self) -> None:
        pass

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return {}


class OneServer:
    """A course on which every request but those for /denied goes to a server with one script."""

    def __init__(self, script: bytes, piece: int) -> None:
        self._script, self._piece = script, piece
        self.servers: list[Scripted] = []
        self.reusable: list[bool] = []

    async def open(self, request: h11.Request) -> tuple[h11.Request, ByteStream]:
        if request.target == b"/denied":
            raise Denied(403, "no")
        self.servers.append(Scripted(self._script, self._piece))
        return request, self.servers[-1]

    def answered(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        return headers

    async def done(self, *, reusable: bool) -> None:
        self.reusable.append(reusable)


async def exchange(client: bytes, server: bytes, piece: int = 65536) -> tuple[bytes, OneServer, object]:
    stream, course = Scripted(client, piece), OneServer(server, piece)
    with anyio.fail_after(20):
        result = await Exchange(stream, course).run()
    return stream.sent, course, result


ASKED = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


async def test_requests_follow_one_another():
    """Several requests on a connection get an answer each; a refusal ends it, with a reason."""
    sent, course, _ = await exchange(ASKED * 3, ANSWER)
    assert sent == ANSWER * 3 and course.reusable == [True] * 3
    sent, course, _ = await exchange(b"GET /denied HTTP/1.1\r\nHost: x\r\n\r\n" + ASKED, ANSWER)
    assert sent.startswith(b"HTTP/1.1 403 ") and sent.endswith(b"no\n") and not course.servers
    _, _, result = await exchange(b"CONNECT a:443 HTTP/1.1\r\nHost: x\r\n\r\nrest", b"")
    assert isinstance(result, tuple) and result[0].target == b"a:443" and result[1] == b"rest"


@pytest.mark.parametrize(
    ("answer", "told", "reusable"),
    [
        (b"", b"HTTP/1.1 502 ", False),
        (b"junk\r\n\r\n", b"HTTP/1.1 502 ", False),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 300_000, b"HTTP/1.1 502 ", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi", b"HTTP/1.1 200 ", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhiHTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 ", False),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", b"HTTP/1.1 200 ", False),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + ANSWER, b"HTTP/1.1 100 ", True),
        (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n", b"HTTP/1.1 502 ", False),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.1 204 ", True),
    ],
)
async def test_answers_that_are_none(answer, told, reusable):
    """What is no answer becomes a 502 in our words, one that breaks off breaks off, a whole one leaves the rest."""
    sent, course, _ = await exchange(ASKED, answer)
    assert sent.startswith(told) and course.reusable == [reusable]
    assert b"junk" not in sent and b"yyy" not in sent


_HEADS = [
    b"",
    ASKED,
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: a\r\nConnection: upgrade\r\n\r\n",
]
_ANSWERS = [
    b"",
    ANSWER,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"HTTP/1.1 101 S\r\nUpgrade: a\r\n\r\n",
]
_NOISE = st.one_of(
    st.binary(max_size=60), st.sampled_from([b"\r\n", b"5\r\nhello\r\n0\r\n\r\n", b"ffffffffffff\r\n", b"\0"])
)
_CLIENTS = st.lists(st.one_of(st.sampled_from(_HEADS), _NOISE), max_size=4)
_SERVERS = st.lists(st.one_of(st.sampled_from(_ANSWERS), _NOISE), max_size=4)


async def test_any_bytes_of_both_sides():
    """The invariant of this file."""
    cases: list[tuple[bytes, bytes, int]] = []

    @settings(max_examples=300)
    @given(_CLIENTS, _SERVERS, st.sampled_from([1, 7, 65536]))
    def collect(client: list[bytes], server: list[bytes], piece: int) -> None:
        cases.append((b"".join(client), b"".join(server), piece))

    collect()
    for client, server, piece in cases:
        sent, course, result = await exchange(client, server, piece)
        assert not sent or sent.startswith(b"HTTP/1.1 "), (client, server, piece)
        for one in course.servers:
            assert re.match(rb"[!-~]+ [!-~]+ HTTP/1\.1\r\n", one.sent) or not one.sent, (client, one.sent)
        assert result is None
