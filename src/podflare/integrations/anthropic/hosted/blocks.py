"""The two faces of a sandbox call: hosted blocks, which the client sees, and client tool blocks, which the model's API
sees.  Each is a pure function of the other, so that a history can be carried over at any later time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Block = dict[str, Any]

CODE = "code_execution"
BASH = "bash_code_execution"
EDITOR = "text_editor_code_execution"
SANDBOX_TOOLS = (BASH, EDITOR, CODE)
"""Names under which the model calls the sandbox, in the order in which they are declared."""

RESULT_TYPES = {f"{name}_tool_result": name for name in SANDBOX_TOOLS}

INVALID_INPUT = "invalid_tool_input"
UNAVAILABLE = "unavailable"
TOO_MANY = "too_many_requests"
TIMED_OUT = "execution_time_exceeded"
OUTPUT_TOO_LARGE = "output_file_too_large"
FILE_NOT_FOUND = "file_not_found"

_ID = "srvtoolu_local_"
_HEX_ID = "srvtoolu_localx_"
_PLAIN = re.compile(r"[A-Za-z0-9_]{1,200}")

CALLER = "code_execution_20260120"
"""Of a call that code in the sandbox makes; the only tag that clients know, whatever version was declared."""


@dataclass(frozen=True)
class Call:
    """The model asks for something to be run in the sandbox."""

    id: str
    name: str
    input: Mapping[str, Any]


def hosted_id(upstream: str) -> str:
    """The id under which the client sees a call.  It holds the other one, so no table has to outlive this process."""
    return _ID + upstream if _PLAIN.fullmatch(upstream) else _HEX_ID + upstream.encode("utf-8", "replace").hex()


def upstream_id(hosted: object) -> str | None:
    """The inverse of `hosted_id`; None for an id that is none of ours."""
    if not isinstance(hosted, str):
        return None
    if hosted.startswith(_ID):
        return hosted[len(_ID) :] or None
    if hosted.startswith(_HEX_ID):
        try:
            return bytes.fromhex(hosted[len(_HEX_ID) :]).decode() or None
        except ValueError:
            return None
    return None


def is_call(block: Mapping[str, Any]) -> bool:
    """A sandbox call that was made here, as the client has it."""
    return block.get("type") == "server_tool_use" and upstream_id(block.get("id")) is not None


def is_result(block: Mapping[str, Any]) -> bool:
    """The result of one."""
    return block.get("type") in RESULT_TYPES and upstream_id(block.get("tool_use_id")) is not None


def caller_of(block: Mapping[str, Any]) -> str | None:
    """The hosted id of the sandbox call whose code makes this client tool call; None if the model makes it."""
    caller = block.get("caller")
    if block.get("type") != "tool_use" or not isinstance(caller, Mapping):
        return None
    source = caller.get("tool_id")
    return source if isinstance(source, str) and upstream_id(source) is not None else None


def call_of(block: Mapping[str, Any]) -> Call:
    """What a hosted call block asks for."""
    arguments = block.get("input")
    return Call(str(block["id"]), str(block.get("name")), arguments if isinstance(arguments, Mapping) else {})


def hosted_call(tool_use: Mapping[str, Any]) -> Block:
    """The client's view of a `tool_use` block for one of the sandbox tools."""
    return {
        "type": "server_tool_use",
        "id": hosted_id(str(tool_use.get("id"))),
        "name": tool_use.get("name"),
        "input": tool_use.get("input", {}),
    }


def hosted_result(call: Call, content: Mapping[str, Any]) -> Block:
    """The result block of a call."""
    name = call.name if call.name in SANDBOX_TOOLS else CODE
    return {"type": f"{name}_tool_result", "tool_use_id": call.id, "content": dict(content)}


def error_content(name: str, code: str, message: str | None = None) -> Block:
    """`content` of a result for what could not be run at all."""
    content: Block = {"type": f"{name}_tool_result_error", "error_code": code}
    if name == EDITOR:
        content["error_message"] = message
    return content


def output_content(name: str, stdout: str, stderr: str, return_code: int, file_ids: list[str]) -> Block:
    """`content` of a result for code that ran, however it ended."""
    files = [{"type": f"{name}_output", "file_id": file_id} for file_id in file_ids]
    return {
        "type": f"{name}_result",
        "stdout": stdout,
        "stderr": stderr,
        "return_code": return_code,
        "content": files,
    }


def upstream_call(block: Mapping[str, Any]) -> Block:
    """The `tool_use` block behind a hosted call."""
    made: Block = {
        "type": "tool_use",
        "id": upstream_id(block.get("id")),
        "name": block.get("name"),
        "input": block.get("input", {}),
    }
    return _with_cache_mark(made, block)


def upstream_result(block: Mapping[str, Any]) -> Block:
    """The `tool_result` block that the model gets for a hosted result.

    Made of the fields that every client sends back, in a fixed order: the same bytes on every turn.
    """
    content = block.get("content")
    content = content if isinstance(content, Mapping) else {}
    made: Block = {
        "type": "tool_result",
        "tool_use_id": upstream_id(block.get("tool_use_id")),
        "content": _told(content),
    }
    if _failed(content):
        made["is_error"] = True
    return _with_cache_mark(made, block)


def _with_cache_mark(made: Block, source: Mapping[str, Any]) -> Block:
    if source.get("cache_control") is not None:
        made["cache_control"] = source["cache_control"]
    return made


def _failed(content: Mapping[str, Any]) -> bool:
    return str(content.get("type")).endswith("_error") or content.get("return_code") not in (0, None)


_TOLD = (
    "error_code",
    "error_message",
    "stdout",
    "stderr",
    "return_code",
    "is_file_update",
    "content",
    "start_line",
    "num_lines",
    "total_lines",
    "old_start",
    "old_lines",
    "new_start",
    "new_lines",
    "lines",
)
_MAGIC = {"iVBORw0KGgo": "image/png", "/9j/": "image/jpeg", "R0lGOD": "image/gif", "UklGR": "image/webp"}
"""How base64 of each kind of picture begins."""


def _told(content: Mapping[str, Any]) -> str | list[Block]:
    if content.get("file_type") in ("image", "pdf") and isinstance(content.get("content"), str):
        return [_shown(content["file_type"], content["content"])]
    told = {key: content[key] for key in _TOLD if content.get(key) is not None}
    if isinstance(told.get("content"), list):
        del told["content"]  # ids of files, which the hosted tool does not show the model either
    return json.dumps(told, ensure_ascii=False)


def _shown(kind: str, data: str) -> Block:
    if kind == "pdf":
        source = {"type": "base64", "media_type": "application/pdf", "data": data}
        return {"type": "document", "source": source}
    media_type = next((mime for start, mime in _MAGIC.items() if data.startswith(start)), "image/png")
    return {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}
