"""Fuzz harness for everything that a client of the daemon sends, and what the client reads back.

Invariant: any bytes are an object or the one error of their border; any object is a request, within its documented
bounds, or BadRequest; any query is a DiffRequest or BadRequest.  No other exception.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from fuzzing import json_value, objects_near, tries
from hypothesis import given
from hypothesis import strategies as st

from podflare.errors import BadRequest, PodflareError, ProtocolError
from podflare.wire import api, codec, tools
from podflare.wire.events import Event, text_line
from podflare.wire.merges import MAX_MERGE_PATHS, MergeRequest, Resolution

LIGHT = tries(50)
REQUESTS = (
    api.CreateRequest,
    api.ExecRequest,
    api.ForkRequest,
    api.LifetimesRequest,
    api.ToolAnswer,
    MergeRequest,
    Resolution,
)
KEYS = sorted({item.name for cls in REQUESTS for item in fields(cls)} | {"files", "variables", "result", "type"})
likely = st.one_of(
    json_value,
    st.sampled_from(["python", "bash", "default", "ours", "theirs", "file", "variable", "/root", "/../x/./"]),
    st.sampled_from([1, 64, 2**31, 0.5, True, False, None, "", 1e400, -0.0]),
    st.lists(st.sampled_from(["/root", "x", "query", "class", "", "relative", "/a//b"]), max_size=3),
    st.dictionaries(st.sampled_from(["query", "type", "message"]), st.lists(st.sampled_from(["a", "1"])), max_size=2),
)  # fmt: skip


@LIGHT
@given(objects_near(KEYS, likely))
@pytest.mark.parametrize("request_type", REQUESTS, ids=lambda cls: cls.__name__)
def test_requests(request_type: Any, body: dict[str, Any]) -> None:
    """A body is a request or BadRequest, also as it comes from the wire."""
    try:
        body = codec.decode_object(json.dumps(body).encode(), error=BadRequest, what="body")
        found = request_type.from_json(body)
    except BadRequest as exc:
        assert str(exc)
        return
    assert isinstance(found, request_type)
    for item in fields(found):
        value = getattr(found, item.name)
        if item.name.endswith("timeout_seconds") and value is not None:
            assert 0 < value <= api.MAX_LIFETIME_S
    if isinstance(found, api.ForkRequest):
        assert 1 <= found.n <= api.MAX_FORKS
    if isinstance(found, MergeRequest):
        assert len(found.paths) <= MAX_MERGE_PATHS
        assert all(_is_normal(path) for path in found.paths)
    if isinstance(found, api.ExecRequest):
        assert all(tools.is_name(name) for name in found.tools)


@LIGHT
@given(st.lists(st.tuples(st.sampled_from(["paths", "detail", "variables", "?"]), st.text("/.ab\0\ud800", max_size=9))))
def test_diff_queries(query: list[tuple[str, str]]) -> None:
    """A query is a request whose paths lead nowhere but down, or BadRequest."""
    try:
        found = api.DiffRequest.from_query(query)
    except BadRequest:
        return
    assert all(_is_normal(path) for path in found.paths) and len(found.paths) <= api.MAX_DIFF_PATHS


def _is_normal(path: str) -> bool:
    inner = path[1:].split("/") if path != "/" else []
    return path.startswith("/") and not {"", ".", ".."} & set(inner)


@LIGHT
@given(st.one_of(st.binary(max_size=100), json_value.map(lambda value: json.dumps(value).encode())))
def test_objects(data: bytes) -> None:
    """Bytes are a JSON object, which can be sent on, or the border's error."""
    try:
        found = codec.decode_object(data, error=ProtocolError, what="a body")
    except ProtocolError:
        return
    again = codec.encode_object(found)
    assert again.isascii() and codec.decode_object(again, error=ProtocolError, what="a body") == found


@pytest.mark.parametrize("inner", ["[" * 10**6, '{"a":' * 10**6, "1" * 10**6, "-" * 10**6, "1e999", "NaN", "-Infinity"])
def test_bombs(inner: str) -> None:
    """What would exhaust a parser's stack or its time, or is no number that can be sent on, is refused."""
    for bomb in (inner, f'{{"x":{inner}', f'{{"x":{inner}}}'):
        with pytest.raises(BadRequest):
            codec.decode_object(bomb.encode(), error=BadRequest, what="a body")


@LIGHT
@given(st.one_of(json_value, st.lists(st.text(max_size=4), max_size=4)))
def test_tools(value: Any) -> None:
    """Tools are names that Python can call, or the border's error."""
    try:
        found = tools.read_tools(value, error=BadRequest)
    except BadRequest:
        return
    assert len(found) <= tools.MAX_TOOLS
    assert all(tools.is_name(word) for name, parameters in found.items() for word in (name, *parameters))


@LIGHT
@given(json_value, st.integers(0, 40))
def test_check_json(value: Any, cap: int) -> None:
    """A value within its cap has the size that it is told to have; a larger one is refused."""
    try:
        size = tools.check_json(value, max_bytes=cap, error=BadRequest, what="a value")
    except BadRequest:
        return
    assert size <= cap and len(json.dumps(value, separators=(",", ":")).encode()) == size


@LIGHT
@given(st.text(), st.integers(0, 2**53), st.integers(0, 2**53))
def test_text_lines(text: str, seq: int, ts: int) -> None:
    """The quick encoder of a line of text writes what the general one does, in one ASCII line."""
    line = text_line("stdout", text, seq, ts)
    assert line == Event("stdout", text, seq, ts).to_line()
    assert line.isascii() and len(line.decode().splitlines()) == 1 and line.endswith(b"\n")


@LIGHT
@given(objects_near(["type", "data", "seq", "ts"]))
def test_events(body: dict[str, Any]) -> None:
    """An event that was read is the one that was sent, or it is refused."""
    try:
        event = Event.from_json(body)
    except PodflareError as exc:
        assert isinstance(exc, ProtocolError)
        return
    assert {"type": event.type, "data": event.data, "seq": event.seq, "ts": event.ts, **event.extra} == body
