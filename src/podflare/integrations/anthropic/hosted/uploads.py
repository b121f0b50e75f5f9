"""Blocks that name a file: `container_upload`, and documents and pictures whose source is a file id.

The files are kept here, so the model's API knows none of their ids: it gets a note, or the content.
"""

from __future__ import annotations

import base64
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from podflare.errors import BadRequest
from podflare.integrations.anthropic.hosted.blocks import Block
from podflare.integrations.anthropic.hosted.history import Message, blocks_of

INPUT_DIR = "/tmp/inputs"
_UNFIT = re.compile(r"[\x00-\x1f\x7f/]")
_INLINE = ("document", "image")


def uploaded_ids(messages: Sequence[Message]) -> list[str]:
    """Ids of the files that belong in the container, each once, in order.

    Raises: BadRequest for a block without an id.
    """
    found: dict[str, None] = {}
    for message in messages:
        for block in blocks_of(message):
            if block.get("type") == "container_upload":
                file_id = block.get("file_id")
                if not isinstance(file_id, str) or not file_id:
                    raise BadRequest("container_upload: `file_id` must be a string")
                found[file_id] = None
    return list(found)


def referenced_ids(messages: Sequence[Message]) -> list[str]:
    """Ids of the files that documents and pictures show, each once, in order."""
    return list(dict.fromkeys(_source_id(block) or "" for block in _inlinable(messages)))


def _inlinable(messages: Sequence[Message]) -> Iterator[Block]:
    for message in messages:
        for block in blocks_of(message):
            if _source_id(block) is not None:
                yield block
            elif block.get("type") == "tool_result":
                yield from (inner for inner in blocks_of(block) if _source_id(inner) is not None)


def _source_id(block: Mapping[str, Any]) -> str | None:
    source = block.get("source")
    if block.get("type") not in _INLINE or not isinstance(source, Mapping) or source.get("type") != "file":
        return None
    file_id = source.get("file_id")
    return file_id if isinstance(file_id, str) else None


def input_names(files: Sequence[tuple[str, str]]) -> dict[str, str]:
    """File id -> its name in the input directory, for (id, original name) in the order of the conversation.

    The same whenever more files follow, so that notes in the history never change.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for file_id, original in files:
        name = _UNFIT.sub("_", posixpath.basename(original))[:200] or file_id
        if name in (".", "..") or name in taken:
            name = f"{file_id}_{name.strip('.')}"
        taken.add(name)
        names[file_id] = name
    return names


def with_notes(messages: Sequence[Message], names: Mapping[str, str]) -> list[Message]:
    """Each `container_upload` block becomes a line of text that tells the model where the file is."""

    def note(block: Block) -> Block:
        if block.get("type") != "container_upload":
            return block
        path = f"{INPUT_DIR}/{names[block['file_id']]}"
        made: Block = {"type": "text", "text": f"[The file {path} was uploaded to the code execution environment.]"}
        if block.get("cache_control") is not None:
            made["cache_control"] = block["cache_control"]
        return made

    return _mapped(messages, note)


def with_content(messages: Sequence[Message], files: Mapping[str, tuple[str, bytes]]) -> list[Message]:
    """Documents and pictures of the files in `files`, id -> (media type, content), carry it themselves."""

    def inline(block: Block) -> Block:
        if block.get("type") == "tool_result" and isinstance(block.get("content"), list):
            return {**block, "content": [inline(each) if isinstance(each, dict) else each for each in block["content"]]}
        found = files.get(_source_id(block) or "")
        return block if found is None else {**block, "source": _source(*found)}

    return _mapped(messages, inline) if files else list(messages)


def _source(media_type: str, content: bytes) -> Block:
    if media_type == "application/pdf" or media_type.startswith("image/"):
        return {"type": "base64", "media_type": media_type, "data": base64.b64encode(content).decode("ascii")}
    return {"type": "text", "media_type": "text/plain", "data": content.decode("utf-8", "replace")}


def _mapped(messages: Sequence[Message], change: Callable[[Block], Block]) -> list[Message]:
    """Messages in which nothing changes stay the same objects."""
    out: list[Message] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            changed = [change(block) if isinstance(block, dict) else block for block in content]
            if any(new is not old for new, old in zip(changed, content, strict=True)):
                message = {**message, "content": changed}
        out.append(message)
    return out
