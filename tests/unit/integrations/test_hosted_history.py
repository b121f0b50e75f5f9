"""What the client keeps and what the model's API saw are two views of one conversation."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conversation import Conversation
from hypothesis import given, settings
from hypothesis import strategies as st

from podflare.errors import BadRequest
from podflare.integrations.anthropic.hosted.history import pending_calls, upstream_messages
from podflare.integrations.anthropic.hosted.request import Files, parse

WORDS = st.sampled_from(["a", "ü\u2028", '"quoted"\n', "x" * 40])
QUIET = st.one_of(
    st.builds(lambda text: {"text": text}, WORDS),
    st.builds(lambda text: {"thinking": text}, WORDS),
)
CALLS = st.one_of(
    st.builds(lambda text: {"bash": text}, WORDS),
    st.builds(lambda text: {"code": text}, WORDS),
    st.builds(lambda text: {"edit": {"command": "view", "path": text}}, WORDS),
    st.just({"bash": "odd id", "id": "toolu-with-dashes"}),
)
CLIENT = st.just({"tool": "client", "input": {"n": 1}})


def rounds(calls: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[list[list[dict[str, Any]]]]:
    one = st.builds(
        lambda before, made: [*before, *made], st.lists(QUIET, max_size=2), st.lists(calls, min_size=1, max_size=3)
    )
    return st.builds(
        # A client cannot send back an answer that is empty altogether; after calls it may well be.
        lambda many, last: [*many, last if many or last else [{"text": "nothing"}]],
        st.lists(one, max_size=4),
        st.lists(QUIET, max_size=2),
    )


def unique_ids(turns: list[list[list[dict[str, Any]]]]) -> list[list[list[dict[str, Any]]]]:
    for number, part in enumerate(part for turn in turns for parts in turn for part in parts):
        if "id" in part:
            part["id"] = f"toolu-{number}"
    return turns


@settings(max_examples=150, deadline=None)
@given(
    turns=st.lists(rounds(st.one_of(CALLS, CALLS, CLIENT)), min_size=1, max_size=3).map(json.dumps).map(json.loads),
    streaming=st.booleans(),
    max_rounds=st.integers(1, 4),
    pauses=st.integers(0, 2),
)
def test_every_request_carries_on_what_the_model_saw(
    turns: list[list[list[dict[str, Any]]]], streaming: bool, max_rounds: int, pauses: int
) -> None:
    """Whatever mixture of calls, pauses and empty answers: each request repeats the last one, is valid, keeps
    signatures intact, and no call is run twice."""
    conversation = Conversation(streaming=streaming, max_rounds=max_rounds, pauses=pauses)
    for turn in unique_ids(turns):
        answers = conversation.say(*turn)
        assert answers[-1]["stop_reason"] == "end_turn"
    for body in conversation.asked:
        text = json.dumps(body)
        assert "srvtoolu" not in text and "container" not in body
    calls = [block for body in conversation.asked[-1:] for m in body["messages"] for block in _blocks(m)]
    assert len({block["id"] for block in calls if block["type"] == "tool_use"}) >= len(conversation.ran)


def _blocks(message: dict[str, Any]) -> list[dict[str, Any]]:
    return message["content"] if isinstance(message["content"], list) else []


@settings(max_examples=30, deadline=None)
@given(turn=rounds(CALLS).map(json.dumps).map(json.loads))
def test_a_streaming_client_gets_the_same_message(turn: list[list[dict[str, Any]]]) -> None:
    """The events of a stream add up to the message that a client gets which does not stream."""
    unique_ids([turn])
    plain, streamed = Conversation(), Conversation(streaming=True)
    one, other = plain.say(*turn)[-1], streamed.say(*turn)[-1]
    for key in ("content", "stop_reason", "id", "role", "model", "usage", "container"):
        assert one[key] == other[key], key


def test_results_of_a_mixed_turn_come_first() -> None:
    """A sandbox call beside a client's tool is run on the next request, and its result precedes the client's."""
    conversation = Conversation()
    first, second = conversation.say([{"tool": "client"}, {"bash": "one"}, {"edit": {}}], [{"text": "done"}])
    assert [block["type"] for block in first["content"]] == ["tool_use", "server_tool_use", "server_tool_use"]
    assert first["stop_reason"] == "tool_use"
    assert [block["type"] for block in second["content"]] == [
        "bash_code_execution_tool_result",
        "text_editor_code_execution_tool_result",
        "text",
    ]
    results = conversation.asked[-1]["messages"][-1]["content"]
    called = {block["id"]: block["name"] for block in conversation.asked[-1]["messages"][-2]["content"]}
    assert [called[block["tool_use_id"]] for block in results] == [
        "bash_code_execution",
        "text_editor_code_execution",
        "client",
    ]


def test_calls_of_code_never_reach_the_model() -> None:
    """Code that calls the client's tool twice ends in one result; the model sees neither call."""
    conversation = Conversation(pauses=2)
    first, second, third = conversation.say([{"code": "await query({})"}], [{"text": "done"}])
    assert [block["type"] for block in first["content"]] == ["server_tool_use", "tool_use"]
    assert first["content"][1]["caller"] == {"type": "code_execution_20260120", "tool_id": first["content"][0]["id"]}
    assert [block["type"] for block in second["content"]] == ["tool_use", "tool_use"]
    assert second["usage"]["input_tokens"] == 0
    assert [block["type"] for block in third["content"]] == ["code_execution_tool_result", "text"]
    assert '"query"' not in json.dumps(conversation.asked[-1]["messages"][1:])


def test_a_history_without_hosted_blocks_stays_the_same_objects() -> None:
    """Nothing is copied or reordered where nothing is ours, not even messages that follow one another."""
    messages = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": ""},
    ]
    assert [new is old for new, old in zip(upstream_messages(messages), messages, strict=True)] == [True] * 3


def test_blocks_of_the_real_service_pass_unchanged() -> None:
    """A server tool block whose id is none of ours is the API's own."""
    block = {"type": "server_tool_use", "id": "srvtoolu_01A", "name": "bash_code_execution", "input": {"command": "ls"}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [block]}]
    assert upstream_messages(messages) == messages
    assert pending_calls(messages) == []


def test_a_cache_mark_on_a_hosted_block_is_kept() -> None:
    """`cache_control` travels from hosted blocks to what stands for them."""
    mark = {"type": "ephemeral"}
    conversation = Conversation()
    conversation.say([{"bash": "one"}], [{"text": "done"}])
    for block in conversation.messages[-1]["content"][:2]:
        block["cache_control"] = mark
    made = upstream_messages(conversation.messages)
    assert made[1]["content"][0]["cache_control"] == mark and made[2]["content"][0]["cache_control"] == mark


CALL = {"type": "server_tool_use", "id": "srvtoolu_local_toolu_1", "name": "bash_code_execution", "input": {}}
RESULT = {"type": "bash_code_execution_tool_result", "tool_use_id": "srvtoolu_local_toolu_1", "content": {}}
INNER = {
    "type": "tool_use",
    "id": "toolu_2",
    "name": "query",
    "input": {},
    "caller": {"type": "code_execution_20260120", "tool_id": "srvtoolu_local_toolu_1"},
}
TOOL = [{"type": "code_execution_20260521", "name": "code_execution"}]
ASK = {"role": "user", "content": "hi"}
MIXED = {"role": "assistant", "content": [CALL, {"type": "tool_use", "id": "toolu_5", "name": "client", "input": {}}]}
PAUSED = {"role": "assistant", "content": [CALL, INNER]}


def _answered(tool_use_id: str, content: Any = "x") -> dict[str, Any]:
    result = {"type": "tool_result", "tool_use_id": tool_use_id, "content": content}
    return {"role": "user", "content": [result]}


@pytest.mark.parametrize(
    ("messages", "more", "says"),
    [
        ([ASK, {"role": "assistant", "content": [CALL]}, ASK], {}, "only `tool_result` blocks may follow"),
        ([ASK, {"role": "assistant", "content": [RESULT]}], {}, "no corresponding"),
        ([ASK, {"role": "assistant", "content": [CALL, CALL]}], {}, "must be unique"),
        ([ASK, {"role": "assistant", "content": [INNER]}], {}, "no code execution that waits"),
        ([ASK, {"role": "assistant", "content": [CALL]}], {"tools": []}, "must be declared again"),
        ([ASK, PAUSED, ASK], {"container": "c"}, "only `tool_result`"),
        ([ASK, PAUSED, _answered("toolu_2")], {"container": None}, "container: required"),
        ([ASK, PAUSED, _answered("toolu_3")], {}, "without `tool_result`"),
        ([ASK, MIXED, _answered("toolu_4")], {}, "without `tool_result`"),
        ([ASK, MIXED], {}, "without `tool_result`"),
        ([ASK, PAUSED, _answered("toolu_2", [{"type": "image"}])], {}, "only text"),
        ([], {}, "at least one message"),
        ([{"role": "user"}], {}, "content"),
        ([{"role": "user", "content": ["x"]}], {}, "content"),
        (["x"], {}, "messages.0"),
        ([{"role": "user", "content": [{"type": "container_upload"}]}], {}, "file_id"),
        ([ASK], {"container": {"id": "c", "skills": [{"type": "anthropic"}]}}, "skills"),
        ([ASK], {"container": 7}, "container"),
        ([ASK], {"tools": {}}, "tools"),
    ],
)  # fmt: skip
def test_histories_that_the_hosted_tool_refuses(messages: Any, more: dict[str, Any], says: str) -> None:
    """A history that was edited so that it makes no sense is refused with words that say where."""
    with pytest.raises(BadRequest, match=says):
        parse({"messages": messages, "tools": TOOL, "container": "c", **more})


KEYS = st.sampled_from(
    ["type", "id", "tool_use_id", "content", "caller", "tool_id", "role", "name", "input", "source", "file_id"]
)
TELLING = st.sampled_from(
    ["server_tool_use", "tool_use", "tool_result", "user", "assistant", CALL["id"], RESULT["type"], "file", "document"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner | TELLING, max_size=6),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(messages=st.lists(JSON, max_size=4) | JSON, tools=st.just(TOOL) | JSON, container=st.just("c") | JSON)
def test_garbage_is_refused_or_rewritten(messages: Any, tools: Any, container: Any) -> None:
    """Whatever JSON a client sends, it is refused with BadRequest or makes a body for the API."""
    body = {"messages": messages, "tools": tools, "container": container}
    try:
        parsed = parse(body)
    except BadRequest:
        return
    names = dict.fromkeys(parsed.uploaded, "name")
    json.dumps(parsed.upstream_body([], Files(names, {}), relaxed=False))
