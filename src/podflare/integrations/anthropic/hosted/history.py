"""A conversation as the client has it -> the conversation that the model's API has seen.

The client keeps a hosted call and its result in one assistant message.  Behind it each is a `tool_use` that a user
message answers.  `upstream_messages` is a pure function of the client's messages; the messages of a turn under way are
made by it, too, so a later turn sends the same prefix byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from podflare.errors import BadRequest
from podflare.integrations.anthropic.hosted.blocks import (
    SANDBOX_TOOLS,
    Block,
    Call,
    call_of,
    caller_of,
    is_call,
    is_result,
    upstream_call,
    upstream_result,
)

Message = dict[str, Any]


def touches(messages: Sequence[Message]) -> bool:
    """Whether there is a block of ours among them."""
    return any(
        is_call(block) or is_result(block) or block.get("type") == "container_upload" or caller_of(block) is not None
        for message in messages
        for block in blocks_of(message)
    )


def blocks_of(message: Mapping[str, Any]) -> list[Block]:
    """The blocks of a message whose content is a list; [] for text."""
    content = message.get("content")
    return [block for block in content if isinstance(block, dict)] if isinstance(content, list) else []


def upstream_messages(messages: Sequence[Message]) -> list[Message]:
    """The messages for the model's API.  None of them is empty, none holds a block of ours."""
    out: list[Message] = []
    mends = False  # the last message of `out` was made here, so what follows may have to join it
    inner = _inner_calls(messages)
    for message in messages:
        blocks = blocks_of(message)
        if message.get("role") == "assistant" and any(_is_ours(block) for block in blocks):
            _add_hosted_turn(out, message)
            mends = True
            continue
        kept = _without_inner_results(message, inner)
        if kept is None:
            continue
        if mends and out and out[-1].get("role") == kept.get("role") == "user":
            out[-1] = {**kept, "content": [*_as_blocks(out[-1]), *_as_blocks(kept)]}
        else:
            out.append(kept)
        mends = kept is not message
    return out


def _is_ours(block: Mapping[str, Any]) -> bool:
    return is_call(block) or is_result(block) or caller_of(block) is not None


def _inner_calls(messages: Sequence[Message]) -> set[str]:
    """Ids of client tool calls that were made by code: the model has never seen them."""
    return {
        str(block.get("id")) for message in messages for block in blocks_of(message) if caller_of(block) is not None
    }


def _without_inner_results(message: Message, inner: set[str]) -> Message | None:
    blocks = blocks_of(message)
    if not inner or message.get("role") != "user":
        return message
    kept = [block for block in blocks if block.get("type") != "tool_result" or block.get("tool_use_id") not in inner]
    if len(kept) == len(blocks):
        return message
    return {**message, "content": kept} if kept else None


def _add_hosted_turn(out: list[Message], message: Message) -> None:
    """Split an assistant message at each group of results."""
    for block in blocks_of(message):
        if caller_of(block) is not None:
            continue
        if is_result(block):
            _add_result(out, upstream_result(block))
        else:
            made = upstream_call(block) if is_call(block) else block
            if out and out[-1].get("role") == "assistant":
                out[-1] = {**out[-1], "content": [*_as_blocks(out[-1]), made]}
            else:
                out.append({"role": "assistant", "content": [made]})


def _add_result(out: list[Message], result: Block) -> None:
    """Results of sandbox calls come first in their message, whoever answered first."""
    if not out or out[-1].get("role") != "user":
        out.append({"role": "user", "content": [result]})
        return
    there = _as_blocks(out[-1])
    before = blocks_of(out[-2]) if len(out) > 1 else []
    ran = {block.get("id") for block in before if block.get("name") in SANDBOX_TOOLS}
    place = 0
    while place < len(there) and there[place].get("tool_use_id") in ran:
        place += 1
    out[-1] = {**out[-1], "content": [*there[:place], result, *there[place:]]}


def _as_blocks(message: Mapping[str, Any]) -> list[Block]:
    content = message.get("content")
    if isinstance(content, list):
        return list(content)
    return [{"type": "text", "text": content}] if content else []


def pending_calls(messages: Sequence[Message]) -> list[Call]:
    """Sandbox calls that still wait to be run, in order; to be run before the model is asked.

    Raises: BadRequest if something else than the results of client tools follows them, or one is missing; for a
        result without a call.
    """
    waiting: dict[str, Call] = {}
    seen: set[str] = set()
    for index, message in enumerate(messages):
        if message.get("role") == "assistant":
            for block in blocks_of(message):
                if is_call(block):
                    call = call_of(block)
                    if call.id in seen:
                        raise BadRequest(f"messages.{index}: `server_tool_use` ids must be unique: {call.id:.120}")
                    seen.add(call.id)
                    waiting[call.id] = call
                elif is_result(block):
                    if waiting.pop(block["tool_use_id"], None) is None:
                        raise BadRequest(
                            f"messages.{index}: `{block['type']}` for {block['tool_use_id']:.120} has no "
                            "corresponding `server_tool_use` block that waits for it"
                        )
                elif (source := caller_of(block)) is not None and source not in waiting:
                    raise BadRequest(
                        f"messages.{index}: `tool_use` {block.get('id')!r:.80} has the caller {source:.120}, "
                        "which is no code execution that waits"
                    )
        elif waiting and not _only_results(message):
            names = ", ".join(call.id for call in waiting.values())
            raise BadRequest(
                f"messages.{index}: only `tool_result` blocks may follow while a code execution waits to be run "
                f"({names:.200})"
            )
    if waiting:
        _check_answers(messages)
    return list(waiting.values())


def _check_answers(messages: Sequence[Message]) -> None:
    """Before anything is run: what the API would refuse afterwards."""
    last = blocks_of(messages[-1]) if messages[-1].get("role") == "user" else []
    answered = {str(block.get("tool_use_id")) for block in last}
    asked = [str(block.get("id")) for block in _last_turn(messages) if block.get("type") == "tool_use"]
    missing = [tool_use_id for tool_use_id in asked if tool_use_id not in answered]
    if missing:
        raise BadRequest(
            f"messages.{len(messages) - 1}: `tool_use` ids were found without `tool_result` blocks immediately after: "
            f"{', '.join(missing):.400}"
        )


def _only_results(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(block, dict) and block.get("type") == "tool_result" for block in content)
    )


def inner_calls(messages: Sequence[Message], call_id: str) -> list[str]:
    """Ids of the client tool calls that the code of this sandbox call has made so far."""
    return [str(block.get("id")) for message in messages for block in blocks_of(message) if caller_of(block) == call_id]


def inner_answers(messages: Sequence[Message], call_id: str) -> dict[str, str]:
    """tool_use id -> text that the last message gives to the code of this sandbox call.

    Preconditions: `pending_calls` took the messages.
    Raises: BadRequest for a result that is no text.
    """
    if messages[-1].get("role") != "user":
        return {}
    asked = {str(block.get("id")) for block in _last_turn(messages) if caller_of(block) == call_id}
    return {
        str(block["tool_use_id"]): _text_of(block)
        for block in blocks_of(messages[-1])
        if str(block.get("tool_use_id")) in asked
    }


def _last_turn(messages: Sequence[Message]) -> list[Block]:
    return next((blocks_of(message) for message in reversed(messages) if message.get("role") == "assistant"), [])


def _text_of(result: Block) -> str:
    content = result.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    blocks = blocks_of(result)
    if len(blocks) != len(content) or any(not isinstance(block.get("text"), str) for block in blocks):
        raise BadRequest("tool_result: only text can be given to code that calls a tool")
    return "".join(block["text"] for block in blocks)
