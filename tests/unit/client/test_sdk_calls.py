"""client/_calls.py: requests and replies without I/O."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podflare.client import _calls
from podflare.client._calls import EventReader, ResultBuilder
from podflare.errors import BadRequest, ProtocolError
from podflare.wire.api import ForkReport, SandboxUsage
from podflare.wire.events import Event

OUT = b'{"type":"stdout","data":"a\\u2028b","seq":0,"ts":1}\n'
EXIT = (
    b'{"type":"exit","data":1,"seq":1,"ts":2,"cell_id":"c1","duration_ms":1500,"reason":"timed_out","restarted":true}\n'
)


def collected(*pieces: bytes) -> list[Event]:
    reader = EventReader()
    return [event for piece in pieces for event in reader.feed(piece)] + reader.finish()


@given(st.lists(st.integers(min_value=0, max_value=len(OUT + EXIT)), max_size=12))
def test_events_do_not_depend_on_where_the_stream_is_cut(cuts: list[int]) -> None:
    """Any cutting of the bytes gives the same events, heartbeats between them included."""
    data = b"\n" + OUT + b"\n\n" + EXIT
    edges = [0, *sorted(cuts), len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(edges)]
    assert [(event.type, event.data) for event in collected(*pieces)] == [("stdout", "a\u2028b"), ("exit", 1)]


def test_lines_end_at_newline_only() -> None:
    """Raw line separators of Unicode inside a string do not cut a line; CRLF ends and a missing last newline pass."""
    raw = '{"type":"stdout","data":"x\u2028y\u0085z","seq":0,"ts":1}\r\n{"type":"exit","data":"3","seq":1,"ts":1}'
    events = collected(raw.encode())
    assert events[0].data == "x\u2028y\u0085z"
    assert _result(events).exit_code == 3


def test_a_line_of_three_megabytes_arrives_whole() -> None:
    """A long line in many pieces is joined once, not searched again with every piece."""
    text = "x" * 3_000_000
    line = json.dumps({"type": "stdout", "data": text, "seq": 0, "ts": 1}).encode() + b"\n"
    assert collected(*(line[i : i + 1000] for i in range(0, len(line), 1000)))[0].data == text


@pytest.mark.parametrize("line", [b" \n", b"nonsense\n", b"[1]\n", b'{"type":"stdout"}\n', b"[" * 100_000 + b"\n"])
def test_a_line_that_is_no_event_is_one_error(line: bytes) -> None:
    """Whatever a broken daemon sends surfaces as ProtocolError, never as a KeyError or RecursionError."""
    with pytest.raises(ProtocolError):
        collected(line)


def test_an_endless_line_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of an unfinished line is bounded."""
    monkeypatch.setattr(_calls, "MAX_LINE_BYTES", 1000)
    reader = EventReader()
    with pytest.raises(ProtocolError, match="1000"):
        for _ in range(3):
            reader.feed(b"x" * 400)


def _result(events: list[Event]):  # type: ignore[no-untyped-def]  # test code
    builder = ResultBuilder()
    builder.add(events)
    return builder.build()


def test_result_joins_lines_as_the_wire_demands() -> None:
    """Lines are joined by newline without a last one, per stream; events of unknown type are passed over."""
    events = [
        Event("stdout", "a", 0, 1),
        Event("stderr", "e", 1, 1),
        Event("stdout", "", 2, 1),
        Event("sparkles", {"x": 1}, 3, 1),
        Event("exit", 0, 4, 1),
    ]
    result = _result(events)
    assert (result.stdout, result.stderr, result.exit_code, result.ok) == ("a\n", "e", 0, True)


def test_result_carries_values_error_and_how_it_ended() -> None:
    """Rich values, the exception, duration, cell id, reason and restart reach the user."""
    events = [
        Event("result", {"text/plain": "42", "text/html": "<b>42</b>", "image/png": "AAEC"}, 0, 1, {"kind": "value"}),
        Event("error", {"name": "ValueError", "value": "no", "traceback": "Traceback..."}, 1, 1),
        *collected(EXIT),
    ]
    result = _result(events)
    assert (result.results[0].text, result.results[0].html, result.results[0].png) == ("42", "<b>42</b>", b"\0\1\2")
    assert result.error is not None and result.error.name == "ValueError"
    assert (result.duration, result.cell_id, result.reason, result.restarted) == (1.5, "c1", "timed_out", True)
    assert not result.ok


def test_stream_without_exit_gives_minus_one() -> None:
    """A stream that ends early is not taken for success."""
    result = _result([Event("stdout", "a", 0, 1)])
    assert (result.stdout, result.exit_code, result.reason, result.ok) == ("a", -1, "incomplete", False)


def test_exit_code_that_is_no_number_is_an_error() -> None:
    """A daemon's nonsense exit code is named, not guessed."""
    with pytest.raises(ProtocolError, match="exit code"):
        _result([Event("exit", None, 0, 1)])


def test_create_leaves_out_what_was_not_asked_for() -> None:
    """None keys and an empty template are not sent; False and the idempotency key are."""
    call = _calls.create({"template": "", "egress": False, "ram_mib": None, "timeout_seconds": 5}, "key1")
    assert json.loads(call.body or b"") == {"egress": False, "timeout_seconds": 5}
    assert call.headers["idempotency-key"] == "key1"


@pytest.mark.parametrize("timeout", [0, -1, math.nan, "5", True])
def test_bad_timeout_is_refused_before_sending(timeout: object) -> None:
    """A timeout that is no positive number is a ValueError."""
    with pytest.raises(ValueError, match="timeout"):
        _calls.execute("sbx_1", "1", "python", timeout)  # type: ignore[arg-type]  # the point of the test


def test_code_must_be_text() -> None:
    """Bytes as code are a TypeError that says so."""
    with pytest.raises(TypeError, match="str"):
        _calls.execute("sbx_1", b"1", "python", None)  # type: ignore[arg-type]  # the point of the test


@pytest.mark.parametrize("n", [0, -1, 33, 1.5, True])
def test_fork_count_is_checked_first(n: object) -> None:
    """Fork takes 1 to 32."""
    with pytest.raises(ValueError, match="32"):
        _calls.fork("sbx_1", n, True, None)  # type: ignore[arg-type]  # the point of the test


def test_fork_sends_what_differs_from_the_default() -> None:
    """A plain fork has the body that every daemon knows; it is never sent twice by itself."""
    plain = _calls.fork("sbx_1", 2, True, None)
    assert json.loads(plain.body or b"") == {"n": 2} and not plain.repeatable
    assert json.loads(_calls.fork("sbx_1", 1, False, 5).body or b"") == {
        "n": 1,
        "reseed": False,
        "timeout_seconds": 5,
    }
    with pytest.raises(ValueError, match="timeout"):
        _calls.fork("sbx_1", 1, True, 0)


@pytest.mark.parametrize("body", [b"{}", b'{"children":["a"]}', b'{"children":["a",2]}'])
def test_fork_answer_must_have_every_child(body: bytes) -> None:
    """Fewer ids than asked for, or something else, is no fork."""
    with pytest.raises(ProtocolError, match="2 children"):
        _calls.parse_children(_calls.fork("sbx_1", 2, True, None), body, 2)


def test_diff_names_its_paths() -> None:
    """Each path is a query field, quoted; bytes that are no UTF-8 survive; no paths means the daemon's default."""
    assert _calls.diff("sbx_1", "sbx/2", None, False).path == "/v1/sandboxes/sbx_1/diff/sbx%2F2"
    path = _calls.diff("sbx_1", "sbx_2", ["/a b&c", "/\udcff"], True).path
    assert path == "/v1/sandboxes/sbx_1/diff/sbx_2?paths=%2Fa+b%26c&paths=%2F%FF&detail=true"
    for wrong in ("/root", [b"/root"]):
        with pytest.raises(TypeError, match="list of str"):
            _calls.diff("sbx_1", "sbx_2", wrong, False)  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(ValueError, match="at least one"):
        _calls.diff("sbx_1", "sbx_2", [], False)


def test_diff_answer() -> None:
    """Three sorted lists; details leniently; an answer without the lists is a protocol error."""
    call = _calls.diff("sbx_1", "sbx_2", None, True)
    lists = {"added": ["/b", "/a"], "removed": [], "modified": ["/c"]}
    assert _calls.parse_diff(call, json.dumps(lists).encode()) == {**lists, "added": ["/a", "/b"]}
    detail = {
        "/c": {"kind": "file", "size_before": 1, "size_after": 2, "patch": "-a\n+b\n"},
        "/a": {"kind": "file", "size_before": None, "size_after": 5, "patch": None, "new": 1},
        "/odd": 7,
    }
    assert _calls.parse_diff(call, json.dumps({**lists, "detail": detail}).encode()).get("detail") == {
        "/c": detail["/c"],
        "/a": {"kind": "file", "size_before": None, "size_after": 5},
    }
    for body in (b"{}", b'{"added":[],"removed":[],"modified":[1]}'):
        with pytest.raises(ProtocolError, match="modified"):
            _calls.parse_diff(call, body)


def test_variables_of_a_diff() -> None:
    """They are asked for by a query field and come sorted; an answer without a part of them is a protocol error."""
    call = _calls.diff("sbx_1", "sbx_2", None, False, True)
    assert call.path.endswith("/diff/sbx_2?variables=true")
    state = {"type": "int", "size": 5, "fingerprint": "0" * 32}
    change = {f"{key}_{when}": value for key, value in state.items() for when in ("before", "after")}
    lists = {"added": [], "removed": [], "modified": []}
    told = {"added": {"b": state, "a": state}, "removed": {}, "changed": {"c": change}, "unread": {"d": "why"}}
    found = _calls.parse_diff(call, json.dumps({**lists, "variables": told}).encode())["variables"]
    assert found == told and list(found["added"]) == ["a", "b"]
    for spoilt in (None, {**told, "added": []}, {**told, "changed": {"c": state}}, {**told, "added": {"a": 5}}):
        with pytest.raises(ProtocolError, match="variables"):
            _calls.parse_diff(call, json.dumps({**lists, "variables": spoilt}).encode())


def test_ids_and_paths_cannot_change_the_route() -> None:
    """Slashes, dots, question marks and hashes in ids and file names are quoted."""
    assert _calls.destroy("../x?y").path == "/v1/sandboxes/..%2Fx%3Fy"
    assert _calls.download("sbx_1", "/a b/ü#?&.txt").path.endswith("/files?path=%2Fa%20b%2F%C3%BC%23%3F%26.txt")
    with pytest.raises(BadRequest):
        _calls.get("")


@pytest.mark.parametrize("body", [b"", b"[]", b'{"id":5}', b'{"id":""}', b"\xff", b"[" * 100_000])
def test_create_answer_without_id_is_a_protocol_error(body: bytes) -> None:
    """An answer that is no create answer is one clear error."""
    with pytest.raises(ProtocolError):
        _calls.parse_created(_calls.create({}, "k"), body)


def test_info_of_an_unknown_daemon_is_read_leniently() -> None:
    """Missing and odd keys give neutral values; what is there is kept."""
    info = _calls.parse_info({"id": "sbx_1", "isolation": ["seccomp"], "ram_mib": "much", "warnings": None})
    assert (info.id, info.isolation, info.ram_mib, info.warnings, info.egress) == ("sbx_1", ("seccomp",), 0, (), False)
    assert (info.parent_id, info.generation, info.children, info.fork_report) == (None, 0, (), None)
    assert info.usage is None and _calls.parse_info({"usage": [1]}).usage is None
    told = {"memory_bytes": 5, "processes": "many", "new": 1}
    assert _calls.parse_info({"usage": told}).usage == SandboxUsage(5, 0, 0, 0, 0)


def test_info_of_a_fork() -> None:
    """Ancestry and what could not cross are read; odd entries of the report become neutral."""
    report = {"threads": ["worker"], "processes": 2, "sockets": None, "moods": 7}
    info = _calls.parse_info({"parent_id": "sbx_p", "generation": 3, "children": ["sbx_c"], "fork_report": report})
    assert (info.parent_id, info.generation, info.children) == ("sbx_p", 3, ("sbx_c",))
    assert info.fork_report == ForkReport(threads=("worker",), processes=2)
    assert not info.fork_report.lossless and ForkReport().lossless
