"""What a program sees is the same through gateway and middleware, waiting or not, streaming or not."""

from __future__ import annotations

import json
import uuid
from typing import Any

import anthropic
import pytest

from anthropic_upstream import Upstream, script
from gateways import Way

TOOL = {"type": "code_execution_20260521", "name": "code_execution"}
QUERY = {
    "name": "query",
    "description": "Looks something up.",
    "input_schema": {"type": "object", "properties": {"q": {"type": "string"}}},
    "allowed_callers": ["code_execution_20260120"],
}
WEATHER = {"name": "weather", "description": "The weather.", "input_schema": {"type": "object"}}


class Talk:
    """A conversation, kept as a program keeps it: what came is sent back as it came."""

    def __init__(self, way: Way, tools: list[dict[str, Any]]) -> None:
        self._way = way
        self._given = {"tools": tools, "metadata": {"user_id": uuid.uuid4().hex}}
        self._messages: list[Any] = []
        self.container: str | None = None

    def say(self, content: Any) -> anthropic.types.Message:
        self._messages.append({"role": "user", "content": content})
        more = {} if self.container is None else {"container": self.container}
        answer = self._way.ask(self._messages, **self._given, **more)
        self._messages.append({"role": "assistant", "content": answer.content})
        if answer.container is not None:
            self.container = answer.container.id
        return answer


def kinds(message: anthropic.types.Message) -> list[str]:
    return [block.type for block in message.content]


@pytest.mark.parametrize(
    "way",
    ["gateway", "gateway-stream", "gateway-async-stream", "middleware", "middleware-stream", "middleware-async",
     "middleware-async-stream"],
    indirect=True,
)  # fmt: skip
def test_a_turn_of_several_samplings(way: Way, upstream: Upstream) -> None:
    """Thinking, a shell command, a file and a second sampling become one message with hosted blocks, a container and
    the tokens of both; on the next turn the container has its files and the model its whole history."""
    talk = Talk(way, [TOOL])
    create = {"command": "create", "path": "/tmp/six.py", "file_text": "print(6 * 7)\n"}
    first = [{"thinking": "hm"}, {"text": "so"}, {"bash": "echo one; echo two >&2; exit 3"}, {"edit": create}]
    message = talk.say(script(first, [{"thinking": "and"}, {"bash": "python3 /tmp/six.py"}], [{"echo": True}]))
    assert kinds(message) == [
        "thinking", "text", "server_tool_use", "server_tool_use", "bash_code_execution_tool_result",
        "text_editor_code_execution_tool_result", "thinking", "server_tool_use", "bash_code_execution_tool_result",
        "text",
    ]  # fmt: skip
    failed = message.content[4]
    assert failed.tool_use_id == message.content[2].id and message.content[2].input["command"].startswith("echo one")
    assert failed.content.stdout == "one" and failed.content.stderr == "two" and failed.content.return_code == 3
    assert failed.content.content == [] and message.content[5].content.is_file_update is False
    assert "42" in message.content[-1].text
    assert message.stop_reason == "end_turn" and message.container is not None
    assert message.usage.output_tokens == 21 and message.usage.server_tool_use is not None
    again = talk.say(script([{"bash": "cat /tmp/six.py"}], [{"echo": True}]))
    assert "print(6 * 7)" in again.content[-1].text
    assert upstream.rejected == []
    assert all("srvtoolu" not in json.dumps(body) for body in upstream.requests)


def test_a_clients_tool_beside_the_sandbox(way: Way, upstream: Upstream) -> None:
    """The sandbox call waits for the client's result, then its own comes first in the next answer."""
    talk = Talk(way, [TOOL, WEATHER])
    message = talk.say(script([{"bash": "echo ran"}, {"tool": "weather"}], [{"echo": True}]))
    assert kinds(message) == ["server_tool_use", "tool_use"] and message.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": message.content[1].id, "content": "sunny"}
    message = talk.say([result])
    assert kinds(message) == ["bash_code_execution_tool_result", "text"]
    assert "ran" in message.content[1].text and "sunny" in message.content[1].text
    talk.say(script([{"text": "bye"}]))
    assert upstream.rejected == []


PROGRAM = """
import asyncio
kept = await asyncio.gather(*(query({"q": str(n)}) for n in range(3)))
print(await query(q="-".join(kept)))
"""


def test_code_calls_the_clients_tools(way: Way, upstream: Upstream) -> None:
    """Three calls at a time pause the request, a fourth pauses it again, then the code's result opens the answer;
    variables are there for the next code, and the model saw neither call nor result."""
    talk = Talk(way, [{**TOOL, "type": "code_execution_20260120"}, QUERY])
    message = talk.say(
        script([{"thinking": "hm"}, {"code": PROGRAM}], [{"code": "print(len(kept))"}], [{"echo": True}])
    )
    assert kinds(message) == ["thinking", "server_tool_use", "tool_use", "tool_use", "tool_use"]
    assert message.stop_reason == "tool_use" and message.container is not None
    assert {block.caller.tool_id for block in message.content[2:]} == {message.content[1].id}
    assert message.content[2].caller.type == "code_execution_20260120"
    message = talk.say(answers(message))
    assert kinds(message) == ["tool_use"] and message.content[0].input == {"q": "<0>-<1>-<2>"}
    message = talk.say(answers(message))
    assert kinds(message) == [
        "code_execution_tool_result", "server_tool_use", "code_execution_tool_result", "text",
    ]  # fmt: skip
    assert message.content[0].content.stdout == "<<0>-<1>-<2>>"
    assert message.content[2].content.stdout == "3"
    assert upstream.rejected == [] and '"query"' not in json.dumps(upstream.requests[-1]["messages"][1:])


def answers(message: anthropic.types.Message) -> list[dict[str, Any]]:
    return [
        {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": f"<{block.input['q']}>"}]}
        for block in message.content
        if block.type == "tool_use"
    ]


SYNCHRONOUS = pytest.mark.parametrize("way", ["gateway", "middleware-stream"], indirect=True)
STREAMING = pytest.mark.parametrize("way", ["gateway-stream", "middleware-async-stream"], indirect=True)


@SYNCHRONOUS
def test_files_go_in_and_out(way: Way, upstream: Upstream) -> None:
    """An uploaded file is in $INPUT_DIR, what lies in $OUTPUT_DIR comes back as a file; an upload does not."""
    with way.client() as client:
        sent = client.files.upload(file=("in.csv", b"1,2\n"))
        assert sent.filename == "in.csv" and sent.size_bytes == 4 and sent.downloadable is False
        text = script(
            [{"bash": "cat $INPUT_DIR/in.csv | tee $OUTPUT_DIR/out.csv; mkdir $OUTPUT_DIR/not"}], [{"echo": 1}]
        )
        upload = {"type": "container_upload", "file_id": sent.id}
        message = Talk(way, [TOOL]).say([upload, {"type": "text", "text": text}])
        (out,) = message.content[1].content.content
        made = client.files.retrieve_metadata(out.file_id)
        assert made.filename == "out.csv" and made.downloadable is True
        assert client.files.download(out.file_id).read() == b"1,2\n"
        with pytest.raises(anthropic.BadRequestError, match="not downloadable"):
            client.files.download(sent.id)
        assert client.files.delete(out.file_id).id == out.file_id
    assert upstream.rejected == [] and "container_upload" not in json.dumps(upstream.requests)


@SYNCHRONOUS
@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"tools": [TOOL, {**WEATHER, "name": "bash_code_execution"}]}, "must be unique"),
        ({"container": "container_never"}, "does not exist"),
        (
            {"messages": [{"role": "user", "content": [{"type": "container_upload", "file_id": "file_no"}]}]},
            "File not found",
        ),
    ],
)
def test_bad_requests_are_errors_of_the_api(way: Way, upstream: Upstream, more: dict[str, Any], says: str) -> None:
    """What cannot be served raises the client library's own error, before anything reaches the model."""
    given = {"messages": [{"role": "user", "content": "hi"}], "tools": [TOOL], **more}
    with pytest.raises((anthropic.BadRequestError, anthropic.NotFoundError), match=says) as caught:
        way.ask(given.pop("messages"), **given)
    assert caught.value.body["error"]["type"] in ("invalid_request_error", "not_found_error")
    assert caught.value.body["request_id"] and upstream.requests == []


def test_an_error_of_the_api_is_passed_on(way: Way, upstream: Upstream) -> None:
    """Status, type and headers of a first refusal are the API's."""
    with pytest.raises(anthropic.RateLimitError) as caught:
        Talk(way, [TOOL]).say(script([{"fail": [429, "rate_limit_error"], "after": "7"}]))
    assert caught.value.response.headers["retry-after"] == "7" and caught.value.response.headers["request-id"]


def test_overload_amid_a_turn_is_waited_for(way: Way, upstream: Upstream) -> None:
    """A later sampling is tried again: what was run before it is not lost."""
    fails_once = [{"fail": [529, "overloaded_error", 1]}, {"echo": True}]
    message = Talk(way, [TOOL]).say(script([{"bash": "echo once >> /tmp/log; cat /tmp/log"}], fails_once))
    assert message.content[-1].text.count("once") == 1


def test_lasting_failure_amid_a_turn_is_an_error(way: Way, upstream: Upstream) -> None:
    """It is raised as the client library raises errors, streaming or not."""
    with pytest.raises(anthropic.APIStatusError, match="as the script says"):
        Talk(way, [TOOL]).say(script([{"bash": "true"}], [{"fail": [400, "invalid_request_error"]}]))


@STREAMING
@pytest.mark.parametrize("fault", [{"cut": True}, {"garbage": "data: {\n\n"}, {"stream_error": "overloaded_error"}])
def test_a_broken_stream_is_an_error(way: Way, upstream: Upstream, fault: dict[str, Any]) -> None:
    """Half a stream, garbage and an error event of the API end the client's stream with an error, never silently."""
    with pytest.raises(anthropic.APIStatusError):
        Talk(way, [TOOL]).say(script([{"bash": "true"}], [{"text": "a"}, fault]))


@SYNCHRONOUS
def test_threads_are_refused_so_that_the_runner_goes_on_without(way: Way, upstream: Upstream) -> None:
    """`tool_runner` begins with a message thread, falls back by itself, and brings a mixed turn to its end."""

    @anthropic.beta_tool
    def weather() -> str:
        """The weather."""
        return "sunny"

    text = script(
        [{"bash": "echo ran > /tmp/kept"}, {"tool": "weather"}], [{"bash": "cat /tmp/kept"}], [{"echo": True}]
    )
    with way.client() as client:
        runner = client.beta.messages.tool_runner(
            model="claude-scripted", max_tokens=100, tools=[TOOL, weather], stream=way.streaming,
            messages=[{"role": "user", "content": text}],
        )  # fmt: skip
        last = runner.until_done()
    assert "ran" in last.content[-1].text and upstream.rejected == []
    assert "thread" not in json.dumps(upstream.requests)


@SYNCHRONOUS
def test_count_tokens_counts_what_the_model_gets(way: Way, upstream: Upstream) -> None:
    """The tools that stand for the hosted one are counted, and no sandbox is made."""
    with way.client() as client:
        few = client.messages.count_tokens(model="m", messages=[{"role": "user", "content": "hi"}])
        more = client.messages.count_tokens(model="m", messages=[{"role": "user", "content": "hi"}], tools=[TOOL])
    assert more.input_tokens > few.input_tokens + 1000
    assert {tool["name"] for tool in upstream.requests[-1]["tools"]} == {
        "bash_code_execution", "text_editor_code_execution",
    }  # fmt: skip
