"""A Messages API on loopback that says what a test wrote for it, and refuses every request that the real one refuses.

The newest text of the user that begins with `script:` holds the rounds to come as JSON, so the server keeps no state
and any number of conversations can run at a time.  A round is a list of parts:

    {"text": "..."}, {"thinking": "..."}, {"bash": "..."}, {"edit": {...}}, {"code": "..."},
    {"tool": name, "input": {...}}, {"echo": true} (the tool results it was given, as text), {"flood": n} (much text),
    {"raw": {...}} (a block as it is), {"stop": "max_tokens"}, {"fail": [status, error type, how often]},
    {"hang": true}, {"cut": true}, {"garbage": "..."}, {"stream_error": "overloaded_error"}

A thinking block is signed over all that came before it, and the signature is checked whenever it comes back: a history
that was put together differently is refused.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import select
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PREFIX = "script:"
MODEL = "claude-scripted"
OWN_BETAS = ("code-execution-", "files-api-")
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_SERVER_TOOLS = re.compile(r"(web_search|web_fetch|bash|text_editor|memory)_\d{8}")
_USER_BLOCKS = {"text", "image", "document", "tool_result"}
_ASSISTANT_BLOCKS = {"text", "thinking", "redacted_thinking", "tool_use", "server_tool_use", "web_search_tool_result"}


class Rejected(Exception):
    """A 400."""


def script(*rounds: list[dict[str, Any]]) -> str:
    """Text for the user's message that makes the model do this."""
    return PREFIX + json.dumps(rounds)


class Judge:
    """What the API refuses; and that a conversation is sent again as it was sent before."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._seen: dict[str, tuple[str, list[dict[str, Any]]]] = {}
        self._lock = threading.Lock()

    def next_id(self, kind: str) -> str:
        return f"{kind}_{next(self._ids):06d}"

    def check(self, body: dict[str, Any]) -> None:
        """Raises: Rejected."""
        tools = _check_tools(body.get("tools") or [])
        _check_choice(body.get("tool_choice"), tools)
        for key in ("container", "mcp_container"):
            if body.get(key) is not None:
                raise Rejected(f"{key}: not without a container tool")
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise Rejected("messages: at least one message is required")
        _check_messages(messages, tools)
        self._check_prefix(body)

    def _check_prefix(self, body: dict[str, Any]) -> None:
        """What was sent of a conversation before is sent again as it was: else a prompt cache would not hold it."""
        key = body.get("metadata", {}).get("user_id")
        if key is None:
            return
        frame = json.dumps([body.get("tools"), body.get("system")])
        with self._lock:
            before = self._seen.get(key)
            self._seen[key] = (frame, body["messages"])
        if before is None:
            return
        if before[0] != frame:
            raise Rejected("prefix: tools or system have changed")
        old, new = before[1], body["messages"][: len(before[1])]
        if len(new) < len(old) or _text(old[:-1]) != _text(new[:-1]):
            raise Rejected("prefix: the messages have changed")
        last, now = _blocks(old[-1]), _blocks(new[-1])
        if _text(now[: len(last)]) != _text(last):
            raise Rejected(f"prefix: the last message has changed: {last} {now}")


class Upstream(Judge):
    """The server, as long as its `with` block lasts.  `requests` has every accepted body, `heads` their headers."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[dict[str, Any]] = []
        self.heads: list[dict[str, str]] = []
        self.rejected: list[str] = []
        self.failures: dict[str, int] = {}
        """How often a `fail` part has failed, by its text; one with a third entry fails so often only."""
        self.broken = 0
        """Answers that nobody took to their end."""
        upstream = self

        class Handler(_Handler):
            owner = upstream

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Upstream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _text(value: Any) -> str:
    """Clients order the keys of blocks as they like; every string in them has to stay."""
    return json.dumps(value, sort_keys=True)


def _check_headers(headers: dict[str, str]) -> None:
    if headers.get("anthropic-version") not in ("2023-06-01", "2026-10-21"):
        raise Rejected("anthropic-version: header is required")
    for beta in headers.get("anthropic-beta", "").split(","):
        if beta.strip().startswith(OWN_BETAS):
            raise Rejected(f"anthropic-beta: {beta} is none of this API's business")


def _check_tools(tools: list[dict[str, Any]]) -> set[str]:
    names: list[str] = []
    for tool in tools:
        kind = tool.get("type") or "custom"
        if kind != "custom" and not _SERVER_TOOLS.fullmatch(kind):
            raise Rejected(f"tools: {kind} must not get here")
        if not _NAME.fullmatch(str(tool.get("name"))):
            raise Rejected(f"tools: name {tool.get('name')!r}")
        if kind == "custom" and tool.get("input_schema", {}).get("type") != "object":
            raise Rejected("tools: input_schema.type must be 'object'")
        if tool.get("allowed_callers", ["direct"]) != ["direct"]:
            raise Rejected(f"tools: allowed_callers {tool['allowed_callers']} needs code execution")
        if kind.startswith("web_") and int(kind[-8:]) >= 20260209 and "allowed_callers" not in tool:
            raise Rejected("tools: this would bring a sandbox of its own")
        names.append(tool["name"])
    if len(set(names)) != len(names):
        raise Rejected("tools: Tool names must be unique")
    return set(names)


def _check_choice(choice: dict[str, Any] | None, tools: set[str]) -> None:
    if choice is not None and choice.get("type") == "tool" and choice.get("name") not in tools:
        raise Rejected(f"tool_choice: no tool {choice.get('name')!r}")
    if choice is not None and not tools:
        raise Rejected("tool_choice: only with tools")


def _blocks(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _check_messages(messages: list[dict[str, Any]], tools: set[str]) -> None:
    called: list[str] = []
    for index, message in enumerate(messages):
        where = f"messages.{index}"
        if message.get("role") != ("user", "assistant")[index % 2]:
            raise Rejected(f"{where}: roles must alternate")
        blocks = _blocks(message)
        if not blocks:
            raise Rejected(f"{where}: must not be empty")
        for block in blocks:
            allowed = _USER_BLOCKS if message["role"] == "user" else _ASSISTANT_BLOCKS
            if block.get("type") not in allowed:
                raise Rejected(f"{where}: a block of type {block.get('type')!r}")
            if block["type"] == "text" and not block.get("text"):
                raise Rejected(f"{where}: text content blocks must be non-empty")
            if block.get("source", {}).get("type") == "file":
                raise Rejected(f"{where}: no such file")
        if message["role"] == "assistant":
            called = [block["id"] for block in blocks if block["type"] == "tool_use"]
            if called and not tools:
                raise Rejected(f"{where}: tool_use without tools")
            _check_signatures(messages[:index], blocks, where)
            continue
        answered = [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"]
        if sorted(answered) != sorted(called):
            raise Rejected(f"{where}: tool_use {called} is answered by tool_result {answered}")
        if any(block["type"] != "tool_result" for block in blocks[: len(answered)]):
            raise Rejected(f"{where}: tool_result blocks come first")
        called = []


def _signature(before: list[dict[str, Any]], blocks: list[dict[str, Any]], thinking: str) -> str:
    text = json.dumps([[{**each, "content": _blocks(each)} for each in before], blocks, thinking], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_signatures(before: list[dict[str, Any]], blocks: list[dict[str, Any]], where: str) -> None:
    for place, block in enumerate(blocks):
        if block["type"] == "thinking" and block["signature"] != _signature(before, blocks[:place], block["thinking"]):
            raise Rejected(f"{where}: Invalid `signature` in `thinking` block")


def next_round(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts that a conversation has come to."""
    for back, message in enumerate(reversed(messages)):
        if message["role"] != "user":
            continue
        for block in _blocks(message):
            if block["type"] == "text" and block["text"].startswith(PREFIX):
                rounds = json.loads(block["text"][len(PREFIX) :])
                done = sum(each["role"] == "assistant" for each in messages[len(messages) - back :])
                return rounds[done] if done < len(rounds) else []
    return [{"text": "There is no script."}]


def _told(messages: list[dict[str, Any]]) -> str:
    return json.dumps([block.get("content") for block in _blocks(messages[-1]) if block["type"] == "tool_result"])


_SANDBOX = {"bash": ("bash_code_execution", "command"), "code": ("code_execution", "code")}


def answer(judge: Judge, body: dict[str, Any], parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that the parts make."""
    messages, content, stop = body["messages"], [], "end_turn"
    for part in parts:
        made: dict[str, Any] | None = None
        for key, (name, argument) in _SANDBOX.items():
            if key in part:
                made = {"name": name, "input": {argument: part[key]}}
        if "edit" in part:
            made = {"name": "text_editor_code_execution", "input": part["edit"]}
        if "tool" in part:
            made = {"name": part["tool"], "input": part.get("input", {})}
        if made is not None:
            stop = "tool_use"
            content.append({"type": "tool_use", "id": part.get("id") or judge.next_id("toolu"), **made})
        elif "text" in part:
            content.append({"type": "text", "text": part["text"], "citations": None})
        elif "flood" in part:
            content.append({"type": "text", "text": "x" * part["flood"], "citations": None})
        elif "echo" in part:
            content.append({"type": "text", "text": _told(messages), "citations": None})
        elif "thinking" in part:
            signature = _signature(messages, list(content), part["thinking"])
            content.append({"type": "thinking", "thinking": part["thinking"], "signature": signature})
        elif "raw" in part:
            content.append(part["raw"])
    stop = next((part["stop"] for part in parts if "stop" in part), stop)
    size = len(json.dumps(messages))
    usage = {"input_tokens": 2, "cache_creation_input_tokens": 0, "cache_read_input_tokens": size, "output_tokens": 7}
    return {
        "id": judge.next_id("msg"), "type": "message", "role": "assistant", "model": body["model"],
        "content": content, "stop_reason": stop, "stop_sequence": None, "usage": usage,
    }  # fmt: skip


def events(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The message as a stream has it."""
    head = {**message, "content": [], "stop_reason": None, "usage": {**message["usage"], "output_tokens": 1}}
    yield {"type": "message_start", "message": head}
    yield {"type": "ping"}
    for index, block in enumerate(message["content"]):
        start, deltas = dict(block), []
        if block["type"] == "text":
            start["text"] = ""
            deltas = [{"type": "text_delta", "text": piece} for piece in _pieces(block["text"])]
        elif block["type"] == "thinking":
            start.update(thinking="", signature="")
            deltas = [{"type": "thinking_delta", "thinking": piece} for piece in _pieces(block["thinking"])]
            deltas.append({"type": "signature_delta", "signature": block["signature"]})
        elif block["type"] == "tool_use":
            start["input"] = {}
            text = json.dumps(block["input"])
            deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in ("", *_pieces(text))]
        yield {"type": "content_block_start", "index": index, "content_block": start}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    delta = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    yield {"type": "message_delta", "delta": delta, "usage": {"output_tokens": message["usage"]["output_tokens"]}}
    yield {"type": "message_stop"}


def _pieces(text: str) -> list[str]:
    size = max(7, len(text) // 100)
    return [text[at : at + size] for at in range(0, len(text), size)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    owner: Upstream

    def do_GET(self) -> None:
        models = {"data": [{"type": "model", "id": MODEL, "display_name": "Scripted"}], "has_more": False}
        self._send(200, {**models, "first_id": MODEL, "last_id": MODEL})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        if not headers.get("x-api-key") and not headers.get("authorization"):
            self._send(401, _error("authentication_error", "no key"))
            return
        try:
            _check_headers(headers)
            self.owner.check(body)
        except Rejected as exc:
            self.owner.rejected.append(str(exc))
            self._send(400, _error("invalid_request_error", str(exc)))
            return
        self.owner.requests.append(body)
        self.owner.heads.append(headers)
        if self.path.startswith("/v1/messages/count_tokens"):
            self._send(200, {"input_tokens": len(json.dumps(body))})
            return
        try:
            self._converse(body)
        except (BrokenPipeError, ConnectionResetError):
            self.owner.broken += 1

    def _converse(self, body: dict[str, Any]) -> None:
        parts = next_round(body["messages"])
        for part in parts:
            if "fail" in part and self._fails(part["fail"]):
                status, kind = part["fail"][:2]
                self._send(status, _error(kind, "as the script says"), {"retry-after": part.get("after", "0.1")})
                return
            if "hang" in part:
                self._hang()
        message = answer(self.owner, body, parts)
        if body.get("stream"):
            self._stream(message, parts)
        else:
            self._send(200, message)

    def _hang(self) -> None:
        """Until the other side goes away.  Raises: ConnectionResetError."""
        if select.select([self.connection], [], [], 30)[0] and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionResetError

    def _fails(self, words: list[Any]) -> bool:
        key = json.dumps(words)
        count = self.owner.failures[key] = self.owner.failures.get(key, 0) + 1
        return len(words) < 3 or count <= words[2]

    def _stream(self, message: dict[str, Any], parts: list[dict[str, Any]]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("request-id", self.owner.next_id("req"))
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        for event in events(message):
            if event["type"] == "message_delta":
                for part in parts:
                    if "cut" in part:
                        return
                    if "garbage" in part:
                        self.wfile.write(part["garbage"].encode())
                    if "stream_error" in part:
                        error = {"type": "error", "error": {"type": part["stream_error"], "message": "Overloaded"}}
                        self.wfile.write(f"event: error\ndata: {json.dumps(error)}\n\n".encode())
                        return
            self.wfile.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())

    def _send(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"request-id": self.owner.next_id("req"), **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.send_header("connection", "close")  # a kept one would look like a leak of the test that opened it
        self.close_connection = True
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Tests read what they need from the owner."""


def _error(kind: str, message: str) -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_upstream"}
