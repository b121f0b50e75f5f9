"""The scripted model's server takes what the Messages API takes and refuses what it refuses."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from podflare.demo.scripted_model import Rejected, ScriptedModel, reply

TOOL = {
    "name": "code_execution",
    "description": "Runs Python.",
    "input_schema": {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
}
FIRST: dict[str, Any] = {
    "model": "any",
    "max_tokens": 100,
    "tools": [TOOL],
    "messages": [{"role": "user", "content": "Do it."}],
}
HEADERS = {"x-api-key": "any", "anthropic-version": "2023-06-01"}


def _second() -> dict[str, Any]:
    body = copy.deepcopy(FIRST)
    answer = reply(body)
    result = {"type": "tool_result", "tool_use_id": answer["content"][1]["id"], "content": "stdout:\nrows: 3\n"}
    body["messages"] += [{"role": "assistant", "content": answer["content"]}, {"role": "user", "content": [result]}]
    return body


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        *way, last = path.split(".")
        target: Any = body
        for step in way:
            target = target[int(step) if step.lstrip("-").isdigit() else step]
        target[int(last) if last.lstrip("-").isdigit() else last] = value

    return change


WRONG: dict[str, Callable[[dict[str, Any]], None]] = {
    "model": _set("model", None),
    "max_tokens": _set("max_tokens", 0),
    "stream": _set("stream", True),
    "tools": _set("tools", []),
    "tools.0.name": _set("tools.0.name", "no spaces please"),
    "is run by the API itself": _set("tools.0.type", "code_execution_20260521"),
    "input_schema.type": _set("tools.0.input_schema", {}),
    "must take 'code'": _set("tools.0.input_schema", {"type": "object", "properties": {}}),
    "at least one message": _set("messages", []),
    "roles must alternate": _set("messages.1.role", "user"),
    "the last message": lambda body: body["messages"].pop(),
    "without `tool_result`": _set("messages.2.content", "Go on."),
    "unexpected `tool_use_id`": lambda body: body["messages"][2]["content"].append(
        {"type": "tool_result", "tool_use_id": "toolu_other", "content": ""}
    ),
    "must come before": lambda body: body["messages"][2]["content"].insert(0, {"type": "text", "text": "Here:"}),
    "non-empty": _set("messages.0.content", [{"type": "text", "text": ""}]),
    "not expected here": _set("messages.0.content", [{"type": "video"}]),
    "tool_result.content": _set("messages.2.content.0.content", [1]),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_request_that_the_api_refuses_is_refused(message: str) -> None:
    """Each mistake is answered with a message that names it."""
    body = _second()
    WRONG[message](body)
    with pytest.raises(Rejected, match=message.replace(".", r"\.")):
        reply(body)


def test_the_next_turn_follows_from_the_result() -> None:
    """The second answer repeats the number of the first tool result and asks for another program."""
    answer = reply(_second())
    assert answer["stop_reason"] == "tool_use"
    assert answer["content"][0]["text"].startswith("3 rows.")
    assert answer["content"][1]["name"] == TOOL["name"]


def test_over_http_it_answers_and_refuses_with_the_apis_shapes() -> None:
    """Success, missing key, wrong path, wrong JSON and a missing version header each have the API's status and body."""
    with ScriptedModel() as server, httpx.Client(base_url=server.url, trust_env=False) as http:
        fine = http.post("/v1/messages", headers=HEADERS, json=FIRST)
        assert fine.status_code == 200 and fine.json()["type"] == "message"
        for status, kind, answer in (
            (401, "authentication_error", http.post("/v1/messages", headers={"anthropic-version": "x"}, json=FIRST)),
            (404, "not_found_error", http.post("/v1/models", headers=HEADERS, json=FIRST)),
            (400, "invalid_request_error", http.post("/v1/messages", headers=HEADERS, content=b"{")),
            (400, "invalid_request_error", http.post("/v1/messages", headers={"x-api-key": "k"}, json=FIRST)),
            (400, "invalid_request_error", http.post("/v1/messages", headers=HEADERS, content=json.dumps([1]))),
        ):
            assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)
