"""The course of a turn, its stream and its numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conversation import NO_FILES, TOOLS, Conversation
from hypothesis import given, settings
from hypothesis import strategies as st

from anthropic_upstream import Judge, answer, events, script
from podflare.errors import ProtocolError
from podflare.integrations.anthropic.hosted import blocks, course
from podflare.integrations.anthropic.hosted.refusals import retry_after_s
from podflare.integrations.anthropic.hosted.request import parse, thread_refusal
from podflare.integrations.anthropic.hosted.rounds import Ask, Turn
from podflare.integrations.anthropic.hosted.stream import EventReader, MessageReader, encode
from podflare.integrations.anthropic.hosted.uploads import input_names, with_content, with_notes
from podflare.integrations.anthropic.hosted.usage import add


def test_a_turn_ends_at_its_cap_and_can_be_resumed() -> None:
    """After the tenth sampling the answer is `pause_turn` with every call run; sent back, it goes on."""
    conversation = Conversation()
    first, second = conversation.say(*[[{"bash": "again"}]] * 12, [{"text": "done"}])
    assert first["stop_reason"] == "pause_turn"
    assert [block["type"] for block in first["content"]].count("server_tool_use") == 10
    assert second["stop_reason"] == "end_turn" and len(conversation.ran) == 12


def test_usage_is_the_sum_of_all_samplings() -> None:
    """Tokens of each sampling count, and the counters of the hosted tool are there."""
    conversation = Conversation()
    (message,) = conversation.say([{"bash": "one"}], [{"bash": "two"}], [{"text": "done"}])
    assert message["usage"]["input_tokens"] == 6 and message["usage"]["output_tokens"] == 21
    assert message["usage"]["server_tool_use"] == {"web_search_requests": 0, "web_fetch_requests": 0}


def test_nested_numbers_are_summed_and_lists_joined() -> None:
    """Details are summed by key; what is no number is the newest; None hides nothing."""
    one = {"a": 1, "details": {"x": 1}, "iterations": [1], "tier": "standard", "cache": None}
    other = {"a": 2, "details": {"x": 2, "y": 3}, "iterations": [2], "tier": "batch", "cache": None, "new": 5}
    assert add(one, other) == {
        "a": 3, "details": {"x": 3, "y": 3}, "iterations": [1, 2], "tier": "batch", "cache": None, "new": 5,
    }  # fmt: skip
    assert add({"a": 1}, {"a": None}) == {"a": 1}


def test_a_call_that_was_cut_off_is_not_run() -> None:
    """`max_tokens` in the middle of calls ends the turn as it is."""
    conversation = Conversation()
    (message,) = conversation.say([{"bash": "half"}, {"stop": "max_tokens"}])
    assert message["stop_reason"] == "max_tokens" and conversation.ran == []


def test_a_forced_tool_is_not_forced_again_within_a_turn() -> None:
    """The second sampling of a turn may answer in words."""
    conversation = Conversation(tools=TOOLS[:2])
    conversation.say([{"bash": "one"}], [{"text": "done"}], tool_choice={"type": "tool", "name": "code_execution"})
    assert [body["tool_choice"] for body in conversation.asked] == [
        {"type": "tool", "name": "bash_code_execution"},
        {"type": "auto"},
    ]


def test_indices_go_on_over_all_samplings() -> None:
    """One message: one start, blocks counted through, one end."""
    conversation = Conversation(streaming=True)
    conversation.say([{"text": "a"}, {"bash": "one"}], [{"thinking": "b"}, {"edit": {}}], [{"text": "done"}])
    body = {"messages": conversation.messages[:1], "tools": TOOLS, "model": "m", "stream": True}
    shown = _streamed(body)
    kinds = [event["type"] for event in shown if event["type"] != "ping"]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("message_start") == kinds.count("message_delta") == kinds.count("message_stop") == 1
    starts = [event for event in shown if event["type"] == "content_block_start"]
    assert [event["index"] for event in starts] == list(range(7))
    assert all(event["content_block"]["input"] == {} for event in starts if "input" in event["content_block"])
    assert "container" not in shown[0]["message"]
    assert shown[-2]["delta"]["container"] == {"id": "c"} and shown[-2]["delta"]["stop_reason"] == "end_turn"


def _streamed(body: dict[str, Any]) -> list[dict[str, Any]]:
    """All events of a turn, driven as the shells do it."""
    turn, judge = Turn(parse(body), NO_FILES, "msg_own"), Judge()
    effects, outcome, data = course.streamed(turn, lambda: {"id": "c"}), None, b""
    from anthropic_upstream import next_round

    while True:
        try:
            effect = effects.send(outcome)
        except StopIteration:
            return EventReader().feed(data)
        outcome = None
        if isinstance(effect, course.Emit):
            data += effect.data
        elif isinstance(effect, course.Perform):
            content = blocks.output_content(effect.call.name, "out", "", 0, [])
            outcome = blocks.hosted_result(effect.call, content)
        elif isinstance(effect, course.Send):
            message = answer(judge, dict(effect.body), next_round(list(effect.body["messages"])))
            outcome = course.Reply(200, None, iter([b"".join(map(encode, events(message)))]))
        elif isinstance(effect, course.Read):
            outcome = next(effect.reply.response, b"")


def test_an_api_that_cannot_be_reached_amid_a_turn() -> None:
    """After its tries the turn fails: with an exception, or with an error event for a client that streams."""
    for begin in (course.in_one_piece, course.streamed):
        turn = Turn(parse({"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS[:1]}), NO_FILES, "msg")
        effects, waits, emitted = begin(turn, lambda: None), 0, b""
        outcome: Any = None
        with pytest.raises((ProtocolError, StopIteration)) as end:
            while True:
                effect = effects.send(outcome)
                outcome = None
                if isinstance(effect, course.Send):
                    whole = json.dumps({**MESSAGE, "stop_reason": "tool_use"}).encode()
                    data = b"".join(map(encode, events({**MESSAGE, "stop_reason": "tool_use"})))
                    pieces = iter([whole if begin is course.in_one_piece else data])
                    outcome = course.Reply(200 if effect.first else None, None, pieces)
                elif isinstance(effect, (course.Read, course.ReadAll)):
                    outcome = next(effect.reply.response, b"")
                elif isinstance(effect, course.Perform):
                    outcome = blocks.hosted_result(effect.call, blocks.output_content(blocks.BASH, "", "", 0, []))
                elif isinstance(effect, course.Emit):
                    emitted += effect.data
                waits += isinstance(effect, course.Wait)
        assert waits == 2
        if begin is course.streamed:
            assert b"could not be reached" in emitted
        else:
            assert isinstance(end.value, ProtocolError)


def _one_ask() -> Turn:
    return Turn(
        parse({"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS[:1], "model": "m"}), NO_FILES, "m"
    )


MESSAGE = answer(
    Judge(),
    {"messages": [{"role": "user", "content": script()}], "model": "m"},
    [{"thinking": "ä"}, {"text": "b\u2028"}, {"bash": "echo ü"}],
)


@given(cuts=st.lists(st.integers(0, 3000), max_size=20), newline=st.sampled_from([b"\n", b"\r\n"]))
def test_events_survive_any_cut_of_their_bytes(cuts: list[int], newline: bytes) -> None:
    """However a network cuts a stream, the same events come out."""
    data = b"".join(map(encode, events(MESSAGE))).replace(b"\n", newline)
    reader, found, before = EventReader(), [], 0
    for cut in [*sorted(cuts), len(data)]:
        found += reader.feed(data[before : max(before, cut)])
        before = max(before, cut)
    assert found == list(events(MESSAGE))


HOSTILE = st.one_of(
    st.sampled_from(list(events(MESSAGE))),
    st.dictionaries(
        st.sampled_from(["type", "index", "delta", "content_block", "message", "usage"]),
        st.one_of(
            st.sampled_from(["message_start", "content_block_start", "content_block_delta", "content_block_stop"]),
            st.sampled_from(["message_delta", "message_stop", "ping", "error", "tool_use", "new_event"]),
            st.integers(-2, 3), st.none(), st.booleans(),
            st.dictionaries(st.sampled_from(["type", "text", "partial_json", "id", "name", "input", "usage"]),
                            st.one_of(st.none(), st.integers(), st.sampled_from(["tool_use", "text_delta",
                            "input_json_delta", "bash_code_execution", "{", "\ud800"])), max_size=4),
        ),
        max_size=4,
    ).map(lambda event: {"type": "content_block_start", **event}),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(hostile=st.lists(HOSTILE, max_size=12))
def test_a_hostile_upstream_is_followed_or_refused(hostile: list[dict[str, Any]]) -> None:
    """Events in whatever order and shape: each is taken or raises ProtocolError, and what is shown can be encoded."""
    turn = _one_ask()
    try:
        for event in hostile:
            if not isinstance(turn.step, Ask):
                break
            if not isinstance(event["type"], str):
                continue  # EventReader lets none of these through
            for shown in turn.take_event(event):
                encode(shown)
        turn.upstream_ended()
    except ProtocolError:
        return
    assert not isinstance(turn.step, Ask)


@pytest.mark.parametrize("data", [b"data: {\n\n", b"data: []\n\n", b'data: {"a": 1}\n\n', b'data: {"type": 7}\n\n'])
def test_what_is_no_event_is_a_protocol_error(data: bytes) -> None:
    """Broken JSON, no object, no type."""
    with pytest.raises(ProtocolError):
        EventReader().feed(data)


def test_an_endless_event_is_a_protocol_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event above its cap is refused while it comes, whether in one line or in many."""
    monkeypatch.setattr("podflare.integrations.anthropic.hosted.stream.MAX_EVENT_BYTES", 1000)
    for piece in (b"x" * 100, b"data: " + b"x" * 100 + b"\n"):
        reader = EventReader()
        with pytest.raises(ProtocolError, match="above"):
            for _ in range(20):
                reader.feed(piece)


def test_a_stream_that_breaks_off_is_a_protocol_error() -> None:
    """A message without its end is none."""
    turn = _one_ask()
    for event in list(events(MESSAGE))[:-1]:
        turn.take_event(event)
    with pytest.raises(ProtocolError, match="in the middle"):
        turn.upstream_ended()


def test_citations_and_unknown_deltas_are_collected() -> None:
    """Citations add up; a delta that nobody knows leaves the block alone."""
    reader = MessageReader()
    for event in (
        {"type": "message_start", "message": {}},
        {"type": "message_start", "message": {"id": "m"}},
    )[1:]:
        reader.feed(event)
    reader.feed(
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": "", "citations": None}}
    )
    reader.feed({"type": "content_block_delta", "index": 0, "delta": {"type": "citations_delta", "citation": {"n": 1}}})
    reader.feed({"type": "content_block_delta", "index": 0, "delta": {"type": "new_delta", "text": "x"}})
    assert reader.content == [{"type": "text", "text": "", "citations": [{"n": 1}]}]


@given(st.text(min_size=1, max_size=40).filter(lambda text: text.isprintable()))
def test_ids_come_back(upstream: str) -> None:
    """The id of a call can be read from the id that the client sees, whatever it is."""
    hosted = blocks.hosted_id(upstream)
    assert hosted.startswith("srvtoolu_") and all(char.isascii() and (char.isalnum() or char == "_") for char in hosted)
    assert blocks.upstream_id(hosted) == upstream


@pytest.mark.parametrize(
    "other", ["srvtoolu_01A", "srvtoolu_local_", "srvtoolu_localx_zz", "srvtoolu_localx_ff", "", None, 7]
)
def test_ids_of_others_are_none_of_ours(other: object) -> None:
    """Ids of the real service, and ids that nobody made, are recognised as such."""
    assert blocks.upstream_id(other) is None


def test_pictures_and_documents_reach_the_model_as_such() -> None:
    """A viewed picture becomes an image block, a PDF a document block, in the tool result."""
    for kind, data, made in (
        ("image", "iVBORw0KGgoAAA", "image"),
        ("image", "/9j/4AAQ", "image"),
        ("pdf", "JVBERi0", "document"),
    ):
        content = {"type": "text_editor_code_execution_view_result", "file_type": kind, "content": data}
        call = blocks.Call("srvtoolu_local_toolu_1", blocks.EDITOR, {})
        told = blocks.upstream_result(blocks.hosted_result(call, content))
        assert told["content"][0]["type"] == made and told["content"][0]["source"]["data"] == data


def test_what_failed_is_marked_for_the_model() -> None:
    """`is_error` goes with error blocks and with programs that fail, not with others."""
    call = blocks.Call("srvtoolu_local_toolu_1", blocks.BASH, {})
    for content, failed in (
        (blocks.output_content(blocks.BASH, "", "", 0, []), False),
        (blocks.output_content(blocks.BASH, "", "", 3, []), True),
        (blocks.error_content(blocks.BASH, "unavailable"), True),
    ):
        assert blocks.upstream_result(blocks.hosted_result(call, content)).get("is_error", False) is failed


def test_names_of_uploads_are_safe_and_never_change() -> None:
    """Two files of one name, hidden tricks and directories: each gets a name that later files leave alone."""
    files = [
        ("file_1", "a.csv"),
        ("file_2", "a.csv"),
        ("file_3", "../../etc/passwd"),
        ("file_4", ".."),
        ("file_5", "x\ny"),
    ]
    names = input_names(files)
    assert names["file_1"] == "a.csv" and names["file_3"] == "passwd" and "\n" not in names["file_5"]
    assert len(set(names.values())) == 5 and all(
        "/" not in name and name not in ("", ".", "..") for name in names.values()
    )
    assert {key: names[key] for key in ("file_1", "file_2")} == input_names(files[:2])


def test_upload_blocks_become_notes_and_files_their_content() -> None:
    """The model reads where a file is; documents and pictures carry their content, also within tool results."""
    document = {"type": "document", "source": {"type": "file", "file_id": "file_2"}}
    messages = [
        {"role": "user", "content": [{"type": "container_upload", "file_id": "file_1"}, document]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [document]}]},
    ]
    made = with_content(with_notes(messages, {"file_1": "a.csv"}), {"file_2": ("application/pdf", b"%PDF")})
    assert "/tmp/inputs/a.csv" in made[0]["content"][0]["text"]
    assert made[0]["content"][1]["source"] == {"type": "base64", "media_type": "application/pdf", "data": "JVBERg=="}
    assert made[1]["content"][0]["content"][0]["source"]["type"] == "base64"
    assert messages[0]["content"][1] is document and document["source"]["type"] == "file"


def test_threads_are_refused_in_the_words_that_clients_understand() -> None:
    """`details.error_code` is what makes the SDK send whole histories instead."""
    refusal = thread_refusal({"thread": {"type": "create"}})
    assert refusal is not None and refusal["details"]["error_code"] == "thread_unsupported_request"
    assert thread_refusal({}) is None and json.dumps(refusal)


@pytest.mark.parametrize(
    ("attempt", "status", "header", "wait_s"),
    [(0, 529, None, 0.5), (1, 529, None, 1.0), (2, 529, None, None), (0, 400, None, None), (0, None, None, 0.5),
     (0, 429, "3", 3.0), (0, 429, "3600", None), (0, 503, "soon", 0.5)],
)  # fmt: skip
def test_later_samplings_are_tried_again_where_it_can_help(
    attempt: int, status: int | None, header: str | None, wait_s: float | None
) -> None:
    """Overload and broken connections are waited for, briefly; errors of the request are not."""
    assert retry_after_s(attempt, status, header) == wait_s
