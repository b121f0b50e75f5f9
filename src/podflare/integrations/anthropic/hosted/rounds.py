"""One turn of the hosted tool: asks the model and runs what it calls, until there is an answer for the client.

A machine without I/O.  `step` says what is to be done next, the `take_*` methods get what came of it and give the
events that a streaming client is to see; `message` is the whole for one that does not stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from podflare.errors import ProtocolError
from podflare.integrations.anthropic.hosted import usage as tokens
from podflare.integrations.anthropic.hosted.blocks import Block, Call, call_of, hosted_call
from podflare.integrations.anthropic.hosted.request import Files, HostedRequest
from podflare.integrations.anthropic.hosted.stream import Event, MessageReader

MAX_ROUNDS = 10
"""Samplings of one turn, as the hosted tool has it; then the client may let it go on."""


@dataclass(frozen=True)
class Ask:
    """Send `body` to the model's API."""

    body: dict[str, Any]
    first: bool
    """Nothing was run or shown yet, so an error of the API can be passed on as it is."""


@dataclass(frozen=True)
class Run:
    """Run these calls in the sandbox, in order."""

    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Paused:
    """Code waits for the client: what it calls, as `tool_use` blocks."""

    tool_uses: tuple[Block, ...]


Step = Ask | Run | None


@dataclass
class Turn:
    """The course of one request."""

    request: HostedRequest
    files: Files
    message_id: str
    """The answer's id where something is shown before the model was asked."""
    max_rounds: int = MAX_ROUNDS

    step: Step = None
    """What to do now; None: the turn is over."""
    _content: list[Block] = field(default_factory=list)
    _head: Block = field(default_factory=dict)
    _end: Block = field(default_factory=dict)
    _usage: tokens.Usage = field(default_factory=dict)
    _rounds: int = 0
    _reader: MessageReader = field(default_factory=MessageReader)
    _base: int = 0
    """Blocks that were shown before the sampling under way."""
    _started: bool = False
    _forced: bool = False

    def __post_init__(self) -> None:
        self.step = Run(self.request.pending) if self.request.pending else self._ask()

    def _ask(self) -> Ask:
        self._reader = MessageReader()
        self._base = len(self._content)
        body = self.request.upstream_body(self._content, self.files, relaxed=self._forced)
        return Ask(body, first=not self._content and not self._started)

    # The sandbox.

    def take_result(self, outcome: Block | Paused) -> list[Event]:
        """What came of the next call of a Run: its result block, or code that waits."""
        assert isinstance(self.step, Run)
        events = self._open()
        if isinstance(outcome, Paused):
            for block in outcome.tool_uses:
                events += self._show(block)
            self._end = {"stop_reason": "tool_use", "stop_sequence": None}
            self.step = None
            return events
        events += self._show(outcome)
        rest = self.step.calls[1:]
        self.step = Run(rest) if rest else self._after_calls()
        return events

    def _after_calls(self) -> Step:
        if self._rounds >= self.max_rounds:
            self._end = {"stop_reason": "pause_turn", "stop_sequence": None}
            return None
        return self._ask()

    def _show(self, block: Block) -> list[Event]:
        index = len(self._content)
        self._content.append(block)
        start = {"type": "content_block_start", "index": index, "content_block": block}
        return [start, {"type": "content_block_stop", "index": index}]

    def opening(self) -> list[Event]:
        """The first event of the stream, if it was not given yet: to be sent before anything takes long."""
        return self._open()

    def _open(self, head: Mapping[str, Any] | None = None, used: Mapping[str, Any] = tokens.NONE) -> list[Event]:
        if self._started:
            return []
        self._started = True
        self._head = dict(head) if head is not None else self._own_head()
        message = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None}
        message["usage"] = tokens.shown(used)
        message.pop("container", None)
        return [{"type": "message_start", "message": message}]

    def _own_head(self) -> Block:
        return {"id": self.message_id, "type": "message", "role": "assistant", "model": self.request.model}

    # The model, streaming.

    def take_event(self, event: Event) -> list[Event]:
        """The next event of the stream that an Ask opened.

        Raises: ProtocolError for one that cannot be.
        """
        assert isinstance(self.step, Ask)
        kind = event["type"]
        self._reader.feed(event)
        if kind == "message_start":
            head = {key: value for key, value in self._reader.head.items() if key != "usage"}
            return self._open(head, self._reader.usage)
        if kind == "message_stop":
            self._round_over(self._reader.content, self._reader.delta, self._reader.usage)
            return []
        if kind in ("ping", "error"):
            return [event]
        if kind not in ("content_block_start", "content_block_delta", "content_block_stop"):
            return []
        shown = {**event, "index": self._base + event["index"]}
        if kind == "content_block_start":
            shown["content_block"] = self._as_hosted(event["content_block"])
        return [shown]

    def upstream_ended(self) -> None:
        """The stream is over.  Raises: ProtocolError if its message is not."""
        if isinstance(self.step, Ask) and not self._reader.complete:
            raise ProtocolError("the model's API ended its answer in the middle")

    # The model, in one piece.

    def take_message(self, message: Mapping[str, Any]) -> None:
        """The whole answer to an Ask.  Raises: ProtocolError if it is no message."""
        assert isinstance(self.step, Ask)
        content = message.get("content")
        if message.get("type") != "message" or not isinstance(content, list):
            raise ProtocolError("the model's API answered with something else than a message")
        if not all(isinstance(block, dict) for block in content):
            raise ProtocolError("the model's API answered with a block that is no object")
        used = message.get("usage")
        used = used if isinstance(used, Mapping) else {}
        ends = ("stop_reason", "stop_sequence", "stop_details", "content", "usage")
        self._open({key: value for key, value in message.items() if key not in ends}, used)
        end = {key: message[key] for key in ("stop_reason", "stop_sequence", "stop_details") if key in message}
        self._round_over(content, end, used)

    def _as_hosted(self, block: Block) -> Block:
        return hosted_call(block) if self._is_ours(block) else block

    def _is_ours(self, block: Mapping[str, Any]) -> bool:
        return block.get("type") == "tool_use" and block.get("name") in self.request.toolset.names

    def _round_over(self, content: Sequence[Block], end: Block, used: Mapping[str, Any]) -> None:
        self._rounds += 1
        self._usage = tokens.add(self._usage, used)
        shown = [self._as_hosted(block) for block in content]
        self._content += shown
        self._end = end
        ours = [call_of(after) for before, after in zip(content, shown, strict=True) if self._is_ours(before)]
        theirs = [block for block in content if block.get("type") == "tool_use" and not self._is_ours(block)]
        if end.get("stop_reason") != "tool_use" or not ours:
            self.step = None
            return
        self._forced = True
        if theirs:
            self.step = None
            return
        self.step = Run(tuple(ours))

    # The end.

    def message(self, container: Mapping[str, Any] | None) -> Block:
        """The whole answer."""
        end = {"stop_sequence": None, **self._end}
        message = {**self._head, "content": self._content, **end, "usage": tokens.shown(self._total())}
        message["container"] = container
        return message

    def closing(self, container: Mapping[str, Any] | None) -> list[Event]:
        """The last events of the stream."""
        outer = {key: value for key, value in self._end.items() if key not in _DELTA_KEYS}
        delta = {key: self._end.get(key) for key in _DELTA_KEYS if key in self._end or key in _ALWAYS}
        delta["container"] = container
        event = {"type": "message_delta", "delta": delta, **outer, "usage": tokens.of_delta(self._total())}
        return [*self._open(), event, {"type": "message_stop"}]

    def _total(self) -> tokens.Usage:
        return self._usage or dict(tokens.NONE)


_ALWAYS = ("stop_reason", "stop_sequence")
_DELTA_KEYS = (*_ALWAYS, "stop_details")
