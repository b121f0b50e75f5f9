"""A Messages server on this machine for demos without an API key.  It is a script, not a language model.

It checks requests the way the real API does, and each of its turns is made from the tool results that it was sent
(`podflare.demo.script`, and `hosted_script` for what comes through the gateway): a wrong result changes what it says.
"""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from podflare.demo import hosted_script
from podflare.demo.script import Call, next_turn

MODEL = "scripted-demo-model"
MAX_REQUEST_BYTES = 8 * 1024 * 1024
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_CALL_ID = "toolu_demo_{:02d}"


class Rejected(Exception):
    """The request is not one that the Messages API would take."""


class ScriptedModel:
    """The server, on a free loopback port, for as long as its `with` block lasts."""

    def __init__(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="scripted-model", daemon=True)

    @property
    def url(self) -> str:
        """Base URL for a client."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> ScriptedModel:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_POST(self) -> None:
        try:
            body = self._body()
            if self.path.split("?")[0] != "/v1/messages":
                self._answer(404, _error("not_found_error", f"no such path: {self.path}"))
            elif not (self.headers.get("x-api-key") or self.headers.get("authorization")):
                self._answer(401, _error("authentication_error", "x-api-key or authorization header is required"))
            else:
                self._answer(200, reply(body))
        except Rejected as error:
            self._answer(400, _error("invalid_request_error", str(error)))

    def _body(self) -> Any:
        length = int(self.headers.get("content-length") or 0)
        if length > MAX_REQUEST_BYTES:
            self.close_connection = True
            raise Rejected(f"request of {length} bytes, the cap is {MAX_REQUEST_BYTES}")
        data = self.rfile.read(length)
        if not self.headers.get("anthropic-version"):
            raise Rejected("anthropic-version: header is required")
        try:
            return json.loads(data)
        except ValueError as error:
            raise Rejected(f"the request body is not valid JSON: {error}") from error

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal belongs to the demo."""


def _error(kind: str, message: str) -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message}}


def reply(body: Any) -> dict[str, Any]:
    """The message that answers the request `body`.

    Raises: Rejected for what the real API refuses with 400.
    """
    if not isinstance(body, dict):
        raise Rejected("the request body must be an object")
    if not isinstance(body.get("model"), str) or not body["model"]:
        raise Rejected("model: field required")
    if not isinstance(body.get("max_tokens"), int) or body["max_tokens"] < 1:
        raise Rejected("max_tokens: must be an integer of at least 1")
    if body.get("stream"):
        raise Rejected("stream: the scripted model answers in one piece only")
    tools = _tools(body.get("tools"))
    results = _results(body.get("messages"))
    says, call = _turn(tools, results)
    content: list[dict[str, Any]] = [{"type": "text", "text": says}]
    if call:
        content.append({"type": "tool_use", "id": _CALL_ID.format(len(results) + 1), **call})
    return {
        "id": f"msg_demo_{len(results):02d}",
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": content,
        "stop_reason": "tool_use" if call else "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": len(json.dumps(body)) // 4, "output_tokens": len(json.dumps(content)) // 4},
    }


def _turn(tools: dict[str, set[str]], results: list[Call]) -> tuple[str, dict[str, Any]]:
    """Words, and the name and input of a tool or nothing; which script it is, the tools tell."""
    if set(tools) == {hosted_script.BASH, hosted_script.EDITOR}:
        hosted = hosted_script.next_turn(results)
        return hosted.says, {"name": hosted.tool, "input": hosted.arguments} if hosted.tool else {}
    if len(tools) != 1:
        raise Rejected("tools: the scripted model needs exactly one tool, or those of the gateway")
    ((name, properties),) = tools.items()
    if "code" not in properties:
        raise Rejected("tools.0.input_schema: the tool must take 'code'")
    turn = next_turn(results)
    return turn.says, {"name": name, "input": {"code": turn.code}} if turn.code else {}


def _tools(tools: Any) -> dict[str, set[str]]:
    """The names of the tools, each with what it takes."""
    if not isinstance(tools, list):
        raise Rejected("tools: must be a list")
    found: dict[str, set[str]] = {}
    for index, tool in enumerate(tools):
        name = tool.get("name") if isinstance(tool, dict) else None
        if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
            raise Rejected(f"tools.{index}.name: must match ^[a-zA-Z0-9_-]{{1,64}}$")
        if tool.get("type", "custom") != "custom":
            raise Rejected(f"tools.{index}.type: {tool['type']!r} is run by the API itself; define a client tool")
        schema = tool.get("input_schema")
        if not isinstance(schema, dict) or schema.get("type") != "object":
            raise Rejected(f"tools.{index}.input_schema.type: must be 'object'")
        properties = schema.get("properties")
        found[name] = set(properties) if isinstance(properties, dict) else set()
    return found


def _results(messages: Any) -> list[Call]:
    """The tool results of the conversation, in order, each checked against the call that it answers."""
    if not isinstance(messages, list) or not messages:
        raise Rejected("messages: at least one message is required")
    results: list[Call] = []
    pending: list[str] = []
    for index, message in enumerate(messages):
        where = f"messages.{index}"
        role = message.get("role") if isinstance(message, dict) else None
        if role != ("user", "assistant")[index % 2]:
            raise Rejected(f"{where}.role: roles must alternate between user and assistant, user first")
        blocks = _blocks(message.get("content"), where)
        if role == "assistant":
            pending = [str(block.get("id")) for block in blocks if block["type"] == "tool_use"]
        else:
            results += _answers(blocks, pending, where)
            pending = []
    if len(messages) % 2 == 0:
        raise Rejected("messages: the last message must come from the user")
    return results


def _blocks(content: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(content, str) and content:
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise Rejected(f"{where}.content: must be text or a list with at least one block")
    for number, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind not in ("text", "tool_use", "tool_result"):
            raise Rejected(f"{where}.content.{number}.type: {kind!r} is not expected here")
        if kind == "text" and not block.get("text"):
            raise Rejected(f"{where}.content.{number}.text: text content blocks must be non-empty")
    return content


def _answers(blocks: list[dict[str, Any]], pending: list[str], where: str) -> list[Call]:
    given = [block for block in blocks if block["type"] == "tool_result"]
    ids = [block.get("tool_use_id") for block in given]
    missing = [call for call in pending if call not in ids]
    if missing:
        raise Rejected(f"{where}: `tool_use` ids were found without `tool_result` blocks immediately after: {missing}")
    for call in ids:
        if call not in pending or ids.count(call) > 1:
            raise Rejected(f"{where}: unexpected `tool_use_id` found in `tool_result` blocks: {call!r}")
    if given and blocks[: len(given)] != given:
        raise Rejected(f"{where}: `tool_result` blocks must come before other content")
    return [Call(_text(block.get("content"), where), bool(block.get("is_error", False))) for block in given]


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list) or not all(isinstance(part, dict) and "type" in part for part in content):
        raise Rejected(f"{where}: tool_result.content must be text or a list of blocks")
    return "\n".join(str(part.get("text", "")) for part in content if part["type"] == "text")
