"""Server-sent events of the Messages API: bytes to events and back, and events to the message that they tell.

What comes from the model's API is checked and bounded like anything else from the network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from podflare.errors import ProtocolError
from podflare.integrations.anthropic.hosted.blocks import Block
from podflare.integrations.anthropic.hosted.usage import Usage, of_round

Event = dict[str, Any]

MAX_EVENT_BYTES = 32 * 1024 * 1024
MAX_MESSAGE_CHARS = 64 * 1024 * 1024
MAX_BLOCKS = 10_000

PING: Event = {"type": "ping"}


def encode(event: Mapping[str, Any]) -> bytes:
    """One event on the wire.  Clients skip events without an `event` line."""
    kind = str(event.get("type", "")).replace("\n", " ").replace("\r", " ")
    return f"event: {kind}\ndata: {json.dumps(event, ensure_ascii=True, separators=(',', ':'))}\n\n".encode("ascii")


def error_event(kind: str, message: str, request_id: str | None = None) -> Event:
    """What tells a client of a stream that its turn has failed."""
    event: Event = {"type": "error", "error": {"type": kind, "message": message}}
    if request_id is not None:
        event["request_id"] = request_id
    return event


class EventReader:
    """Bytes of an event stream, in whatever pieces, -> events."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> list[Event]:
        """The events that `data` completes.

        Raises: ProtocolError for an event that is too large or no JSON object.
        """
        events: list[Event] = []
        *lines, self._rest = (self._rest + data).split(b"\n") if b"\n" in data else [self._rest + data]
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
                self._size += len(line)
            elif not line and self._data:
                events.append(_decode(b"\n".join(self._data)))
                self._data, self._size = [], 0
            if self._size > MAX_EVENT_BYTES:
                break
        if self._size + len(self._rest) > MAX_EVENT_BYTES:
            raise ProtocolError(f"the model's API sent an event above {MAX_EVENT_BYTES} bytes")
        return events


def _decode(data: bytes) -> Event:
    try:
        event = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise ProtocolError(f"the model's API sent an event that is no JSON: {data[:80]!r}") from exc
    if not isinstance(event, dict) or not isinstance(event.get("type"), str):
        raise ProtocolError(f"the model's API sent an event without a type: {data[:80]!r}")
    return event


class MessageReader:
    """Collects the events of one message.

    Knows the deltas of every documented block; any other changes nothing here and still reaches the client.
    """

    def __init__(self) -> None:
        self.head: Block = {}
        self.content: list[Block] = []
        self.delta: Block = {}
        """Last `message_delta`: stop_reason and what goes with it."""
        self.usage: Usage = {}
        self.complete = False
        self._json: dict[int, list[str]] = {}
        self._size = 0

    def feed(self, event: Event) -> None:
        """Raises: ProtocolError for an event that cannot come now."""
        kind = event["type"]
        if kind == "message_start":
            message = event.get("message")
            if self.head or not isinstance(message, dict):
                raise ProtocolError("the model's API sent a wrong message_start")
            self.head = message
            self.usage = dict(message["usage"]) if isinstance(message.get("usage"), dict) else {}
            return
        if kind in ("ping", "error"):
            return
        if not self.head or self.complete:
            raise ProtocolError(f"the model's API sent {kind:.80} outside of a message")
        if kind == "content_block_start":
            self._start(event)
        elif kind == "content_block_delta":
            self._change(event)
        elif kind == "content_block_stop":
            self._stop(event)
        elif kind == "message_delta":
            self._end(event)
        elif kind == "message_stop":
            self.complete = True

    def _start(self, event: Event) -> None:
        block = event.get("content_block")
        if event.get("index") != len(self.content) or not isinstance(block, dict):
            raise ProtocolError("the model's API sent a block out of order")
        if len(self.content) >= MAX_BLOCKS:
            raise ProtocolError(f"the model's API sent more than {MAX_BLOCKS} blocks")
        self.content.append(dict(block))

    def _block(self, event: Event) -> tuple[int, Block]:
        index = event.get("index")
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(self.content):
            raise ProtocolError(f"the model's API sent {event['type']} for a block that is not there")
        return index, self.content[index]

    def _change(self, event: Event) -> None:
        index, block = self._block(event)
        delta = event.get("delta")
        if not isinstance(delta, dict):
            raise ProtocolError("the model's API sent a delta that is no object")
        kind = delta.get("type")
        if kind == "input_json_delta":
            self._json.setdefault(index, []).append(self._text(delta, "partial_json"))
        elif kind == "text_delta":
            block["text"] = str(block.get("text") or "") + self._text(delta, "text")
        elif kind == "thinking_delta":
            block["thinking"] = str(block.get("thinking") or "") + self._text(delta, "thinking")
        elif kind == "signature_delta":
            block["signature"] = self._text(delta, "signature")
        elif kind == "citations_delta":
            block["citations"] = [*(block.get("citations") or []), delta.get("citation")]
        elif kind == "compaction_delta":
            block.update({key: value for key, value in delta.items() if key != "type"})

    def _text(self, delta: Block, key: str) -> str:
        text = delta.get(key)
        if not isinstance(text, str):
            raise ProtocolError(f"the model's API sent a {delta.get('type')} without {key}")
        self._size += len(text)
        if self._size > MAX_MESSAGE_CHARS:
            raise ProtocolError(f"the model's API sent a message above {MAX_MESSAGE_CHARS} characters")
        return text

    def _stop(self, event: Event) -> None:
        index, block = self._block(event)
        text = "".join(self._json.pop(index, []))
        if text:
            try:
                block["input"] = json.loads(text)
            except (ValueError, RecursionError):
                block["input"] = {}  # cut off by max_tokens: such a call is never run

    def _end(self, event: Event) -> None:
        delta, usage = event.get("delta"), event.get("usage")
        self.delta = {
            **(delta if isinstance(delta, dict) else {}),
            **{key: value for key, value in event.items() if key not in ("type", "delta", "usage")},
        }
        self.usage = of_round(self.usage, usage if isinstance(usage, dict) else {})
