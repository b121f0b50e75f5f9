"""The gateway as a server: its other routes, its door, its clients' ends, its restarts, its caps."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anthropic
import httpx
import pytest

from anthropic_upstream import MODEL, Upstream, script
from daemons import ServedDaemon
from gateways import KEY, ServedGateway, Way, gateway
from podflare import AsyncClient
from podflare.integrations.anthropic.gateway.app import gateway as application
from podflare.integrations.anthropic.gateway.config import GatewayConfig

TOOL = {"type": "code_execution_20260521", "name": "code_execution"}
LEGACY = {"type": "code_execution_20250522", "name": "code_execution"}
QUERY = {
    "name": "query",
    "description": "Looks something up.",
    "input_schema": {"type": "object"},
    "allowed_callers": ["code_execution_20260120"],
}
HEADERS = {"x-api-key": KEY, "anthropic-version": "2023-06-01"}
WAIT_S = 20.0


def say(*rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": script(*rounds)}]


def body(*rounds: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"model": "m", "max_tokens": 9, "messages": say(*rounds), "tools": [TOOL], **more}


def until(met: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not met():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)  # what is waited for happens in other processes


# Streams.


def test_the_stream_has_the_documented_events_in_order(front: Way, upstream: Upstream) -> None:
    """Each event has an `event` line; one start, results whole in their start, signs of life while code runs."""
    sent = body([{"bash": "sleep 1.3; echo x"}], [{"text": "done"}], stream=True)
    with httpx.stream("POST", f"{front.base_url}/v1/messages", json=sent, headers=HEADERS, timeout=30) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["request-id"]
        raw = answer.read().decode()
    events = [(event.split("\n")[0], json.loads(event.split("\n")[1][6:])) for event in raw.strip().split("\n\n")]
    assert all(line == f"event: {data['type']}" for line, data in events)
    kinds = [data["type"] for _, data in events]
    call, result = (
        index for index, (_, data) in enumerate(events) if "tool" in str(data.get("content_block", {}).get("type"))
    )
    assert "ping" in kinds[call:result]
    assert events[result][1]["content_block"]["content"]["stdout"] == "x" and kinds[result + 1] == "content_block_stop"
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    assert events[-2][1]["delta"]["container"]["id"].startswith("container_")


def raw_request(front: Way, sent: dict[str, Any], **options: int) -> socket.socket:
    """A connection over which a message was asked for; the caller reads, or does not."""
    parts = urlsplit(front.base_url)
    data = json.dumps(sent).encode()
    head = f"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\nx-api-key: {KEY}\r\nanthropic-version: 2023-06-01\r\n"
    client = socket.socket()
    for name, value in options.items():
        client.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    client.connect((parts.hostname, parts.port))
    client.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    return client


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_hangs_up_interrupts_its_code(front: Way, upstream: Upstream, streaming: bool) -> None:
    """The cell ends early, and the container goes on to be used at once."""
    container = front.ask(say([{"bash": "true"}], []), tools=[TOOL]).container
    assert container is not None
    command = "echo begun > /tmp/log; sleep 100; echo ended > /tmp/log"
    sent = body([{"bash": command}], container=container.id, stream=streaming)
    with raw_request(front, sent):
        until(lambda: len(upstream.requests) == 3, "the model was not asked")
    started = time.monotonic()
    message = front.ask(say([{"bash": "cat /tmp/log; true"}], []), tools=[TOOL], container=container.id)
    assert time.monotonic() - started < WAIT_S and "ended" not in message.content[1].content.stdout


def test_a_client_that_stops_reading_is_dropped(front: Way, upstream: Upstream) -> None:
    """Its request to the model is given up, its connection ended, and nobody else is held up meanwhile."""
    before = upstream.broken
    with raw_request(front, body([{"flood": 50_000_000}], stream=True), SO_RCVBUF=4096) as client:
        assert front.ask(say([{"text": "still here"}]), tools=[TOOL]).content[0].text == "still here"
        until(lambda: upstream.broken > before, "the answer was held for a client that takes nothing")
        until(lambda: _is_over(front, client), "the connection was held")


def _is_over(front: Way, client: socket.socket) -> bool:
    """Whether the gateway's end of the connection is gone; the kernel does not tell the client."""
    ends = f":{urlsplit(front.base_url).port:04X}", f":{client.getsockname()[1]:04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return not any(line[1].endswith(ends[0]) and line[2].endswith(ends[1]) for line in lines)


def test_fifty_conversations_at_a_time_stay_apart(front: Way, upstream: Upstream) -> None:
    """Each gets its own container, its own output and its own history, half of them streaming."""

    async def talk(client: anthropic.AsyncAnthropic, number: int) -> None:
        given: dict[str, Any] = {
            "model": "m",
            "max_tokens": 9,
            "tools": [TOOL],
            "metadata": {"user_id": f"fifty {number}"},
        }
        messages: list[Any] = say(
            [{"thinking": "t"}, {"bash": f"echo me {number} > /tmp/me; cat /tmp/me"}], [{"echo": True}]
        )
        first = await _asked(client, number, messages=messages, **given)
        assert f"me {number}\\" in first.content[-1].text and first.container is not None
        messages += [{"role": "assistant", "content": first.content}, *say([{"bash": "cat /tmp/me"}], [{"echo": True}])]
        second = await _asked(client, number, messages=messages, container=first.container.id, **given)
        assert f"me {number}\\" in second.content[-1].text

    async def all_of_them() -> None:
        async with anthropic.AsyncAnthropic(**front.options()) as client:
            await asyncio.gather(*(talk(client, number) for number in range(50)))

    asyncio.run(all_of_them())
    assert upstream.rejected == []


async def _asked(client: anthropic.AsyncAnthropic, number: int, **given: Any) -> anthropic.types.Message:
    if number % 2:
        return await client.messages.create(**given)
    async with client.messages.stream(**given) as stream:
        return await stream.get_final_message()


# Containers.


def test_python_keeps_its_state_in_the_first_version(front: Way, upstream: Upstream) -> None:
    """`code_execution_20250522` has one Python tool; what it prints comes back, and its files."""
    message = front.ask(
        say([{"code": "x = 6"}], [{"code": "import os; print(x * 7); open(os.environ['OUTPUT_DIR'] + '/f', 'w')"}], []),
        tools=[LEGACY],
    )
    assert [block.type for block in message.content] == ["server_tool_use", "code_execution_tool_result"] * 2
    assert message.content[3].content.stdout == "42" and len(message.content[3].content.content) == 1


def test_a_call_is_run_once_however_often_it_is_asked_for(front: Way, upstream: Upstream) -> None:
    """A follow-up that is sent again, as client libraries do, gets the result of the first run."""
    tools = [TOOL, {"name": "client", "input_schema": {"type": "object"}}]
    container = front.ask(say([{"bash": "true"}], []), tools=tools).container
    assert container is not None
    messages: list[Any] = say([{"bash": "echo x >> /tmp/count; cat /tmp/count"}, {"tool": "client"}], [{"echo": True}])
    first = front.ask(messages, tools=tools, container=container.id)
    messages.append({"role": "assistant", "content": first.content})
    messages.append({"role": "user", "content": [{"type": "tool_result", "tool_use_id": first.content[1].id}]})
    told = [front.ask(messages, tools=tools, container=container.id).content[0].content.stdout for _ in range(3)]
    assert told == ["x", "x", "x"]


def test_a_container_is_forked(front: Way, upstream: Upstream) -> None:
    """Copies have the files of their origin, go on apart from it, and are reached by their own ids."""
    container = front.ask(say([{"bash": "echo origin > /tmp/f"}], []), tools=[TOOL]).container
    assert container is not None
    url = f"{front.base_url}/v1/containers/{container.id}/fork"
    made = httpx.post(url, json={"n": 2}, headers=HEADERS, timeout=30).json()["containers"]
    for number, each in enumerate(made):
        front.ask(say([{"bash": f"echo {number} >> /tmp/f"}], []), tools=[TOOL], container=each["id"])
    for number, each in enumerate(made):
        told = front.ask(say([{"bash": "cat /tmp/f"}], []), tools=[TOOL], container=each["id"])
        assert told.content[1].content.stdout == f"origin\n{number}"
    assert httpx.post(url, json={"n": 0}, headers=HEADERS).status_code == 400
    assert httpx.post(url, json={"n": 1}, headers={**HEADERS, "x-api-key": "another"}).status_code == 400


def test_a_container_whose_sandbox_is_gone_says_so(front: Way, upstream: Upstream, daemon: ServedDaemon) -> None:
    """The running call gets an error block, the next request an error that says to leave the id out."""
    from podflare import Client

    container = front.ask(say([{"bash": "true"}], []), tools=[TOOL]).container
    assert container is not None
    with Client(daemon.url) as client:
        for sandbox in client.list_sandboxes():
            client.destroy_sandbox(sandbox.id)
    message = front.ask(say([{"bash": "true"}], [{"text": "oh"}]), tools=[TOOL], container=container.id)
    assert message.content[1].content.error_code == "unavailable"
    with pytest.raises(anthropic.BadRequestError, match="has expired; send the request without"):
        front.ask(say([]), tools=[TOOL], container=container.id)


def test_code_that_waits_can_be_left_behind(front: Way, upstream: Upstream) -> None:
    """A wrong answer is refused, a container whose code waits is not forked, and its answer may be sent twice."""
    tools = [{**TOOL, "type": "code_execution_20260120"}, QUERY]
    messages: list[Any] = say([{"code": "print(await query(a=1))"}], [{"text": "done"}])
    first = front.ask(messages, tools=tools)
    assert first.container is not None
    url = f"{front.base_url}/v1/containers/{first.container.id}/fork"
    assert httpx.post(url, headers=HEADERS).status_code == 409
    messages.append({"role": "assistant", "content": first.content})
    with pytest.raises(anthropic.BadRequestError, match="only `tool_result`"):
        front.ask([*messages, *say([])], tools=tools, container=first.container.id)
    answer = {"type": "tool_result", "tool_use_id": first.content[1].id, "content": "found"}
    messages.append({"role": "user", "content": [answer]})
    with pytest.raises(anthropic.BadRequestError, match="container: required"):
        front.ask(messages, tools=tools)
    for _ in range(2):
        told = front.ask(messages, tools=tools, container=first.container.id)
        assert told.content[0].content.stdout == "found"


@pytest.mark.parametrize(
    ("call", "content"),
    [
        ({"bash": ""}, {"error_code": "invalid_tool_input"}),
        ({"bash": "exit 7"}, {"return_code": 7}),
        ({"bash": "head -c 3000000 /dev/zero > $OUTPUT_DIR/big"}, {"error_code": "output_file_too_large"}),
        ({"edit": {"command": "view", "path": "/tmp/none"}}, {"error_code": "file_not_found"}),
        ({"edit": {"command": "undo", "path": "/tmp/none"}}, {"error_code": "invalid_tool_input"}),
        ({"edit": {"command": "view"}}, {"error_code": "invalid_tool_input"}),
        ({"edit": {"command": "str_replace", "path": "/etc/hosts"}}, {"error_code": "invalid_tool_input"}),
        ({"edit": {"command": "create", "path": "/tmp/x"}}, {"error_code": "invalid_tool_input"}),
        ({"edit": {"command": "create", "path": "/", "file_text": "x"}}, {"error_code": "invalid_tool_input"}),
        ({"edit": {"command": "create", "path": "/proc/x/y", "file_text": "x"}}, {"error_code": "file_not_found"}),
        ({"edit": {"command": "view", "path": "/dev/zero"}}, {"error_code": "invalid_tool_input"}),
        ({"edit": {"command": "view", "path": "a\0b"}}, {"error_code": "invalid_tool_input"}),
        ({"edit": {"command": "view", "path": 7}}, {"error_code": "invalid_tool_input"}),
        ({"edit": {"command": ["view"], "path": "/tmp"}}, {"error_code": "invalid_tool_input"}),
        ({"tool": "bash_code_execution", "input": {}}, {"error_code": "invalid_tool_input"}),
        ({"tool": "bash_code_execution", "input": {"command": 7}}, {"error_code": "invalid_tool_input"}),
        ({"bash": "echo a\0b"}, {"error_code": "invalid_tool_input"}),
        ({"bash": "printf '\\377 \\303'"}, {"stdout": "\ufffd \ufffd", "return_code": 0}),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_a_result(
    front: Way, upstream: Upstream, call: dict[str, Any], content: dict[str, Any]
) -> None:
    """A call that fails gives the documented error code or the program's own return code, and the turn goes on."""
    message = front.ask(say([call], [{"text": "done"}]), tools=[TOOL])
    assert {key: getattr(message.content[1].content, key) for key in content} == content
    assert message.stop_reason == "end_turn"


def test_the_editor_works_on_the_containers_files(front: Way, upstream: Upstream) -> None:
    """create, view with a range, a directory, str_replace with its place, and a picture that the model sees."""
    png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABh6FO1AAAAABJRU5ErkJggg=="
    edits = [
        {"edit": {"command": "create", "path": "~/a/b.txt", "file_text": "one\ntwo\nthree\n"}},
        {"edit": {"command": "create", "path": "/root/a/b.txt", "file_text": "one\ntwo\nthree\n"}},
        {"edit": {"command": "view", "path": "/root/a/b.txt", "view_range": [2, -1]}},
        {"edit": {"command": "str_replace", "path": "/root/a/b.txt", "old_str": "two", "new_str": "2\n2"}},
        {"edit": {"command": "str_replace", "path": "/root/a/b.txt", "old_str": "e", "new_str": ""}},
        {"edit": {"command": "view", "path": "/root/a/b.txt"}},
        {"edit": {"command": "view", "path": "/root/a"}},
        {"bash": f"echo {png} | base64 -d > /root/a/p.png"},
    ]
    message = front.ask(
        say(edits, [{"edit": {"command": "view", "path": "a/p.png"}}], [{"text": "seen"}]), tools=[TOOL]
    )
    results = [block.content for block in message.content if block.type.endswith("_tool_result")]
    new, again, part, changed, many, whole, folder, _, picture = results
    assert new.is_file_update is False and again.is_file_update is True
    assert (part.content, part.start_line, part.num_lines, part.total_lines) == ("two\nthree", 2, 2, 3)
    assert (changed.old_start, changed.new_lines, changed.lines) == (2, 2, ["-two", "+2", "+2"])
    assert many.error_code == "invalid_tool_input" and "3 times" in many.error_message
    assert whole.content == "one\n2\n2\nthree" and folder.content == "b.txt"
    assert picture.file_type == "image" and picture.content == png
    shown = upstream.requests[-1]["messages"][-1]["content"][0]["content"][0]
    assert shown["type"] == "image" and shown["source"] == {"type": "base64", "media_type": "image/png", "data": png}


def test_long_output_keeps_its_ends_and_says_so(front: Way, upstream: Upstream) -> None:
    """Ten megabytes reach neither client nor model."""
    message = front.ask(
        say([{"bash": "echo first; head -c 10000000 /dev/zero | tr '\\0' x; echo; echo last"}], []), tools=[TOOL]
    )
    text = message.content[1].content.stdout
    assert len(text) < 110_000 and text.startswith("first\n") and text.endswith("last") and "left out" in text


def test_a_hundred_megabytes_of_output_hold_nobody_up(front: Way, upstream: Upstream) -> None:
    """They are cut while they come; the container goes on."""
    message = front.ask(
        say([{"bash": "head -c 100000000 /dev/zero | tr '\\0' x"}], [{"bash": "echo on"}], []), tools=[TOOL]
    )
    assert len(message.content[1].content.stdout) < 110_000 and message.content[3].content.stdout == "on"


@pytest.mark.parametrize("rounds", [2, 1], ids=["later", "at once"])
def test_an_id_that_the_model_uses_twice_is_run_once(front: Way, upstream: Upstream, rounds: int) -> None:
    """Whether in one answer or in the next: the second call gets the result of the first."""
    call = {"bash": "echo x >> /tmp/count; cat /tmp/count", "id": "toolu_same"}
    script_of = [[call], [call], []] if rounds == 2 else [[call, call], []]
    message = front.ask(say(*script_of), tools=[TOOL])
    results = [block.content.stdout for block in message.content if block.type == "bash_code_execution_tool_result"]
    assert results == ["x", "x"]


# Other routes.


def test_files_are_listed_page_by_page_and_belong_to_their_key(front: Way, upstream: Upstream) -> None:
    """Newest first, by the cursors of both versions of the API; another key sees nothing of them."""
    key = "sk-lister"
    with anthropic.Anthropic(api_key=key, base_url=front.base_url, max_retries=0) as client:
        sent = [
            client.files.upload(file=(f"{number}.txt", b"x", "text/x-own"), expires_in_seconds=3600)
            for number in range(5)
        ]
        assert sent[0].mime_type == "text/x-own" and sent[0].expires_at is not None
        assert [file.filename for file in client.files.list(limit=2)] == ["4.txt", "3.txt", "2.txt", "1.txt", "0.txt"]
        assert [file.id for file in client.files.list(ids=[sent[1].id, "file_other"])] == [sent[1].id]
        with pytest.raises(anthropic.BadRequestError, match="expires_in_seconds"):
            client.files.upload(file=("a", b"x"), expires_in_seconds=5)
    headers = {**HEADERS, "x-api-key": key}
    url = f"{front.base_url}/v1/files"
    old = httpx.get(url, params={"limit": 2, "after_id": sent[3].id}, headers=headers).json()
    assert [file["id"] for file in old["data"]] == [sent[2].id, sent[1].id] and old["has_more"] is True
    back = httpx.get(url, params={"limit": 2, "before_id": sent[1].id}, headers=headers).json()
    assert [file["id"] for file in back["data"]] == [sent[3].id, sent[2].id]
    for path in ("", "/content"):
        assert httpx.get(f"{url}/{sent[0].id}{path}", headers=HEADERS).status_code == 404
    assert httpx.delete(f"{url}/{sent[0].id}", headers=HEADERS).status_code == 404
    assert httpx.get(url, headers=HEADERS, params={"limit": 1001}).status_code == 400


def test_a_file_above_the_cap_is_refused_while_it_comes(front: Way) -> None:
    """Three megabytes where two are allowed: 413 in the API's words, nothing kept."""
    with front.client() as client, pytest.raises(anthropic.APIStatusError, match="exceeds") as caught:
        client.files.upload(file=("big", b"x" * (3 << 20)))
    assert caught.value.status_code == 413 and caught.value.body["error"]["type"] == "request_too_large"


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"--b\r\nbad", b'--b\r\ncontent-disposition: form-data; name="x"\r\n\r\n1\r\n--b--']
)
def test_a_broken_upload_is_refused(front: Way, content: bytes) -> None:
    """What is no form, a broken one, or one without a file: 400."""
    for kind in ("multipart/form-data; boundary=b", "multipart/form-data", "text/plain"):
        answer = httpx.post(f"{front.base_url}/v1/files", content=content, headers={**HEADERS, "content-type": kind})
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_documents_of_kept_files_carry_their_content(front: Way, upstream: Upstream) -> None:
    """A document block that names an uploaded file reaches the model with the text in it."""
    with front.client() as client:
        sent = client.files.upload(file=("notes.txt", "Grüße".encode(), "text/plain"))
    document = {"type": "document", "source": {"type": "file", "file_id": sent.id}}
    front.ask([{"role": "user", "content": [document, {"type": "text", "text": "read"}]}])
    source = upstream.requests[-1]["messages"][0]["content"][0]["source"]
    assert source == {"type": "text", "media_type": "text/plain", "data": "Grüße"}


def test_requests_without_the_tool_pass_as_they_are(front: Way, upstream: Upstream) -> None:
    """Same body, same answer, plain and streaming, threads included; models, too."""
    with front.client() as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        sent = {
            "model": "m",
            "max_tokens": 9,
            "messages": [{"role": "user", "content": "hi"}],
            "thread": {"type": "create"},
        }
        answer = httpx.post(
            f"{front.base_url}/v1/messages?beta=true",
            json=sent,
            headers={**HEADERS, "anthropic-beta": "x, files-api-2025-04-14"},
        )
        assert answer.status_code == 200 and upstream.requests[-1] == sent
        assert upstream.heads[-1]["anthropic-beta"] == "x" and upstream.heads[-1]["x-api-key"] == KEY
        with client.messages.stream(model="m", max_tokens=9, messages=say([{"text": "streamed"}])) as stream:
            assert stream.get_final_text() == "streamed"


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "kind"),
    [
        ("POST", "/v1/messages", b"{", 400, "invalid_request_error"),
        ("POST", "/v1/messages", b"[]", 400, "invalid_request_error"),
        ("POST", "/v1/messages", b"\xff\xfe", 400, "invalid_request_error"),
        ("POST", "/v1/messages", b"[" * 200_000, 400, "invalid_request_error"),
        ("POST", "/v1/messages", b" " * (5 << 20), 413, "request_too_large"),
        ("POST", "/v1/messages", json.dumps(body(messages=7)).encode(), 400, "invalid_request_error"),
        ("POST", "/v1/messages/batches", b"{}", 400, "invalid_request_error"),
        ("GET", "/v1/messages/batches/b", b"", 400, "invalid_request_error"),
        ("GET", "/v1/nothing", b"", 404, "not_found_error"),
        ("GET", "/v1/files/..%2f..%2fetc%2fpasswd/content", b"", 404, "not_found_error"),
        ("POST", "/v1/containers/c/fork", b"{}", 400, "invalid_request_error"),
    ],
)
def test_garbage_gets_an_error_of_the_api(
    front: Way, method: str, path: str, content: bytes, status: int, kind: str
) -> None:
    """Status, type and request id, whatever was sent."""
    answer = httpx.request(method, front.base_url + path, content=content, headers=HEADERS, timeout=30)
    told = answer.json()
    assert (answer.status_code, told["type"], told["error"]["type"]) == (status, "error", kind)
    assert told["request_id"] == answer.headers["request-id"]


# The door.


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Basic abc"}, 401),
        ({"authorization": "Bearer k"}, 200),
        ({"x-api-key": "k"}, 200),
        ({"x-api-key": "k", "origin": "https://evil.example"}, 403),
        ({"x-api-key": "k", "host": "evil.example"}, 403),
        ({"x-api-key": "k", "sec-fetch-site": "cross-site"}, 403),
    ],
)
def test_who_may_come_in_without_keys_of_the_gateways_own(front: Way, headers: dict[str, str], status: int) -> None:
    """A key of some kind is needed, in either header, and no web page of another origin gets in."""
    assert httpx.get(f"{front.base_url}/v1/files", headers=headers).status_code == status


def test_keys_of_the_gateways_own(private_temp: Path, daemon: ServedDaemon, upstream: Upstream) -> None:
    """Only they get in, the API sees only the upstream key, neither is written anywhere; and time limits hold."""
    folder = Path(tempfile.mkdtemp(prefix="k", dir=private_temp))
    secret = folder / "key"
    secret.write_text("sk-upstream-secret\n")
    words = [
        "--upstream",
        upstream.url,
        "--daemon",
        daemon.url,
        "--upstream-key-file",
        str(secret),
        "--cell-timeout",
        "1",
        "--idle-timeout",
        "2",
    ]
    try:
        with gateway(folder, *words, env={"PODFLARE_GATEWAY_KEYS": "sk-gate-one, sk-gate-two"}) as running:
            url = f"{running.url}/v1/messages"
            sent = body([{"bash": "sleep 30"}], [{"text": "done"}])
            wrong = httpx.post(url, json=sent, headers={**HEADERS, "x-api-key": "sk-other"})
            assert wrong.status_code == 401 and wrong.json()["error"]["type"] == "authentication_error"
            one = {**HEADERS, "x-api-key": "sk-gate-one"}
            right = httpx.post(url, json=sent, headers=one, timeout=30).json()
            assert right["content"][1]["content"]["error_code"] == "execution_time_exceeded"
            assert {head["x-api-key"] for head in upstream.heads} == {"sk-upstream-secret"}
            assert not any("authorization" in head for head in upstream.heads)
            two = {**HEADERS, "x-api-key": "sk-gate-two"}
            taken = httpx.post(url, json=body([], container=right["container"]["id"]), headers=two)
            assert taken.status_code == 400 and "does not exist" in taken.text
            expires_at = datetime.fromisoformat(right["container"]["expires_at"].replace("Z", "+00:00"))
            until(lambda: datetime.now(timezone.utc) > expires_at, "time stands still")
            late = httpx.post(url, json=body([], container=right["container"]["id"]), headers=one)
            assert late.status_code == 400 and "has expired" in late.text
        secret.unlink()
        found = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
        assert b"sk-" not in found
    finally:
        shutil.rmtree(folder)


def test_a_gateway_that_would_be_open_to_everybody_does_not_start() -> None:
    """It says what is missing, in one line, before it listens."""
    words = ["gateway", "--port", "0", "--data-dir", "/nonexistent/x", "--host", "0.0.0.0"]
    done = subprocess.run([sys.executable, "-m", "podflare", *words], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "PODFLARE_GATEWAY_KEYS" in done.stderr and done.stderr.count("\n") == 1


# Restarts.


def test_containers_outlive_the_gateway_with_their_daemon_only(
    private_temp: Path, daemon: ServedDaemon, upstream: Upstream
) -> None:
    """With a daemon of its own address a container is found again; with a private daemon it has expired."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir=private_temp))
    folder.chmod(0o711)
    try:
        lasting = ["--upstream", upstream.url, "--daemon", daemon.url, "--idle-timeout", "100"]
        with gateway(folder, "--upstream", upstream.url) as running:
            private = Way(running.url).ask(say([{"bash": "true"}], []), tools=[TOOL]).container
            assert private is not None
        with gateway(folder, *lasting) as running:
            way = Way(running.url)
            kept = way.ask(say([{"bash": "echo kept > /tmp/f"}], []), tools=[TOOL]).container
            assert kept is not None
            with pytest.raises(anthropic.BadRequestError, match="has expired"):
                way.ask(say([]), tools=[TOOL], container=private.id)
        with gateway(folder, *lasting) as running:
            told = Way(running.url).ask(say([{"bash": "cat /tmp/f"}], []), tools=[TOOL], container=kept.id)
            assert told.content[1].content.stdout == "kept"
    finally:
        shutil.rmtree(folder)


def test_a_missing_api_is_an_error(private_temp: Path, daemon: ServedDaemon) -> None:
    """An address where nobody answers gives 502 with words, with and without the tool."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="m", dir=private_temp))
    try:
        with gateway(folder, "--upstream", f"http://127.0.0.1:{port}", "--daemon", daemon.url) as running:
            for sent in (body([]), body([], stream=True), {"model": "m", "messages": []}):
                answer = httpx.post(f"{running.url}/v1/messages", json=sent, headers=HEADERS)
                assert answer.status_code == 502 and "could not be reached" in answer.json()["error"]["message"]
    finally:
        shutil.rmtree(folder)


def test_a_hanging_api_does_not_outlive_its_client(shared_gateway: ServedGateway, upstream: Upstream) -> None:
    """A client that gives up while the model thinks takes the request to the API with it."""
    before = upstream.broken
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{shared_gateway.url}/v1/messages",
            json=body([{"hang": True}, {"text": "late"}]),
            headers=HEADERS,
            timeout=0.5,
        )
    until(lambda: upstream.broken > before, "the model is still being asked")


@pytest.mark.anyio
@pytest.mark.parametrize("streaming", [False, True])
async def test_an_api_that_falls_silent_is_given_up(daemon: ServedDaemon, tmp_path: Path, streaming: bool) -> None:
    """A model that says nothing for the longest time allowed gives 504 in the API's words."""
    with Upstream() as silent:
        config = GatewayConfig(upstream=silent.url, data_dir=tmp_path, upstream_silence_s=0.3)
        async with application(config, AsyncClient(daemon.url)) as app:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=HEADERS) as client:
                answer = await client.post("/v1/messages", json=body([{"hang": True}], stream=streaming))
    assert (answer.status_code, answer.json()["error"]["type"]) == (504, "timeout_error")
