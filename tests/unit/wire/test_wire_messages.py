"""Promise: messages survive the wire unchanged, and anything else is one kind of error."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from podflare.errors import ProtocolError
from podflare.wire import messages as m
from podflare.wire import variables as v
from podflare.wire.frames import MAX_MESSAGE_BYTES

PRINT = "0123456789abcdef" * 2

HOST = [
    m.Exec("print(1)\n\u2028\ud800", "bash", "<cell 1>"),
    m.Exec("await f()", tools={"f": ("a", "b"), "g": ()}),
    m.ToolResult(2**40, value={"a": [None, "\u2028\ud800"]}),
    m.ToolResult(1, error="ValueError", message="no"),
    m.Interrupt(),
    m.Kill(),
    m.FileWrite("/a/b"),
    m.FileRead("~/ü\n"),
    m.Ack(2**40),
    m.DataEnd(),
    m.Cancel(),
    v.VariablesSurvey(1500),
    v.VariablesRecall("a1"),
    v.VariablesRemember("a1", {"x": PRINT, "ü": ""}, "a0", ("x",)),
    v.VariablesExport(("x", "_y"), 2**40),
    v.VariablesImport(),
    v.VariablesCommit(("x",), "b2", {}),
]
GUEST = [
    m.Ready(1, "3.11.2"),
    m.Result({"text/plain": "\u2028x", "image/png": "aGk="}, "display"),
    m.Error("ValueError", "text", "Traceback ...\n"),
    m.ToolCall(7, "f", {"a": [1.5, {"": None}]}),
    m.ToolCancel(7),
    m.Exit(-5, m.DIED, True, 9),
    m.Ack(0),
    m.DataEnd(),
    m.FileOpened(0),
    m.FileDone(2**50),
    m.FileFailed(m.NO_SPACE, "f: no room"),
    v.VariablesTable({"x": v.Variable("int", 5, PRINT, "why", ""), "ü": v.Variable("T")}, ("a1", "b2"), ("b2",), 3),
    v.VariablesBase({"x": PRINT, "y": ""}, ("y",), False),
    v.VariablesParcel(("x",), {"lock": "TypeError: no"}),
    v.VariablesStaged(),
    v.VariablesFailed(v.TOO_LARGE, "too much", "x"),
]


@pytest.mark.parametrize("message", HOST, ids=lambda message: message.op)
def test_host_messages_survive(message):
    """Each host message is decoded to what was encoded, from ASCII bytes."""
    payload = m.to_payload(message)
    assert payload.isascii()
    assert m.from_host(payload) == message


@pytest.mark.parametrize("message", GUEST, ids=lambda message: message.op)
def test_guest_messages_survive(message):
    """Each guest message is decoded to what was encoded, from ASCII bytes."""
    payload = m.to_payload(message)
    assert payload.isascii()
    assert m.from_guest(payload) == message


def test_directions_are_apart():
    """A message of one direction is not accepted in the other."""
    for message in HOST:
        if message.op not in ("ack", "data_end"):
            with pytest.raises(ProtocolError):
                m.from_guest(m.to_payload(message))
    for message in GUEST:
        if message.op not in ("ack", "data_end"):
            with pytest.raises(ProtocolError):
                m.from_host(m.to_payload(message))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"[]",
        b"null",
        b'{"op":"exit","code":NaN}',
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"op":' * 100_000,
        b"{}",
        b'{"op":5}',
        b'{"op":"unknown"}',
        b'{"op":"exit"}',
        b'{"op":"exit","code":"0"}',
        b'{"op":"exit","code":true}',
        b'{"op":"exit","code":1e300}',
        b'{"op":"exit","code":0,"reason":"magic"}',
        b'{"op":"exit","code":0,"restarted":1}',
        b'{"op":"exit","code":0,"signal":65}',
        b'{"op":"exit","code":' + b"9" * 5000 + b"}",
        b'{"op":"ready","protocol":1}',
        b'{"op":"result","data":[]}',
        b'{"op":"result","data":{"a":1}}',
        b'{"op":"result","data":{},"kind":"other"}',
        b'{"op":"file_done","size":-1}',
        b'{"op":"file_failed","reason":"none"}',
        b'{"op":"ack","bytes":-1}',
    ],
)
def test_broken_guest_messages(body):
    """Bytes that are no guest message within its bounds give ProtocolError and nothing else."""
    with pytest.raises(ProtocolError):
        m.from_guest(body)


@pytest.mark.parametrize(
    "change",
    [
        {"op": "exec", "code": "x" * (m.MAX_CODE_CHARS + 1)},
        {"op": "exec", "code": 5},
        {"op": "exec", "code": "", "language": "perl"},
        {"op": "exec", "code": "", "name": "n" * 257},
        {"op": "file_read", "path": ""},
        {"op": "file_read", "path": "a\0b"},
        {"op": "file_write", "path": "p" * (m.MAX_PATH_CHARS + 1)},
    ],
)
def test_broken_host_messages(change):
    """Host messages out of bounds are refused by the guest in the same way."""
    with pytest.raises(ProtocolError):
        m.from_host(json.dumps(change).encode())


def test_caps_of_results():
    """A result with too many forms, or too large in sum, is refused."""
    with pytest.raises(ProtocolError):
        m.from_guest(m.to_payload(m.Result({f"t/{n}": "" for n in range(m.MAX_MIME_TYPES + 1)})))
    half = "x" * (m.MAX_RICH_CHARS // 2)
    with pytest.raises(ProtocolError):
        m.from_guest(m.to_payload(m.Result({"a/a": half, "b/b": half, "c/c": "x"})))


def test_unknown_keys_are_ignored():
    """A newer peer may say more."""
    assert m.from_guest(b'{"op":"exit","code":0,"new":{"deep":[1]}}') == m.Exit()


def test_errors_name_the_key_and_what_was_expected():
    """The error's text says which key is wrong and what it must be, and is short whatever was sent."""
    with pytest.raises(ProtocolError, match="'code' must be an integer from"):
        m.from_guest(b'{"op":"exit","code":"' + b"z" * 100_000 + b'"}')
    try:
        m.from_guest(b'{"op":"exit","code":"' + b"z" * 100_000 + b'"}')
    except ProtocolError as exc:
        assert len(str(exc)) < 500


def _bomb(piece: bytes) -> bytes:
    return b'{"op":"exit","x":[' + piece * ((MAX_MESSAGE_BYTES - 40) // len(piece)) + b"0]}"


@pytest.mark.parametrize("piece", [b"[],", b"{},", b"0,", b'"ab",', b'"",', b"[" * 900 + b"]" * 900 + b","])
def test_values_without_end_are_refused_before_they_are_made(piece):
    """A message whose few bytes for each value would become a hundred times as many is refused, for next to nothing."""
    payload = _bomb(piece)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="more than 100000 values"):
            m.from_guest(payload)
        assert tracemalloc.get_traced_memory()[1] < 6 * len(payload)
    finally:
        tracemalloc.stop()


def test_long_texts_are_no_values():
    """A result's long text may hold any number of brackets, commas, quotes and backslashes."""
    page = '<script>[{"a":[1,2,3]},"\\\\","\\""]</script>' * 100_000
    told = m.from_guest(m.to_payload(m.Result({"text/html": page, "text/plain": "x"}, "value")))
    assert told == m.Result({"text/html": page, "text/plain": "x"}, "value")
