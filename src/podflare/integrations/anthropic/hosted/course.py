"""Turns as generators of what is to be done, for shells that differ only in how they wait.

A shell does what it is given and sends the outcome back in.  No I/O here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from podflare.errors import PodflareError, ProtocolError
from podflare.integrations.anthropic.hosted import refusals
from podflare.integrations.anthropic.hosted.blocks import Call
from podflare.integrations.anthropic.hosted.rounds import Ask, Run, Turn
from podflare.integrations.anthropic.hosted.stream import Event, EventReader, encode, error_event


@dataclass(frozen=True)
class Perform:
    """Run the call in the sandbox; send in its result block, or Paused."""

    call: Call


@dataclass(frozen=True)
class Send:
    """Send a body to the model's API; send in its Reply.  An error on the `first` is the shell's own."""

    body: Mapping[str, Any]
    first: bool


@dataclass(frozen=True)
class Reply:
    """An answer that has begun.  `status` is None where there was none."""

    status: int | None
    retry_after: str | None
    response: Any

    @property
    def ok(self) -> bool:
        return self.status == 200


@dataclass(frozen=True)
class Read:
    """Send in the next piece of a reply's body, b"" at its end."""

    reply: Reply


@dataclass(frozen=True)
class ReadAll:
    """Send in the whole body of a reply."""

    reply: Reply


@dataclass(frozen=True)
class Close:
    """The rest of a reply is not needed."""

    reply: Reply


@dataclass(frozen=True)
class Wait:
    """Let time go by."""

    seconds: float


@dataclass(frozen=True)
class Emit:
    """Give these bytes to the client."""

    data: bytes


Effect = Perform | Send | Read | ReadAll | Close | Wait | Emit
Container = Mapping[str, Any] | None
Course = Generator[Effect, Any, Reply | None]
"""Ends with the reply that refused the very first sampling, or with None."""


def in_one_piece(turn: Turn, container: Callable[[], Container]) -> Course:
    """For a client that does not stream: emits the whole answer once.

    Raises: ProtocolError for a reply that is no message.
    """
    while turn.step is not None:
        if isinstance(turn.step, Run):
            turn.take_result((yield Perform(turn.step.calls[0])))
            continue
        reply = yield from _asked(turn.step)
        if reply.status is None:
            raise ProtocolError("the model's API could not be reached")
        if not reply.ok:
            return reply
        turn.take_message(_decoded((yield ReadAll(reply))))
    yield Emit(json.dumps(turn.message(container()), separators=(",", ":")).encode("ascii"))
    return None


def streamed(turn: Turn, container: Callable[[], Container]) -> Course:
    """For a client that streams."""
    try:
        while turn.step is not None:
            if isinstance(turn.step, Run):
                yield from _emitted(turn.opening())
                yield from _emitted(turn.take_result((yield Perform(turn.step.calls[0]))))
                continue
            first = turn.step.first
            reply = yield from _asked(turn.step)
            if not reply.ok:
                if first:
                    return reply
                data = b"" if reply.status is None else (yield ReadAll(reply))
                yield Emit(encode(_error_of(data, reply.status)))
                return None
            if not (yield from _relayed(turn, reply)):
                return None
        yield from _emitted(turn.closing(container()))
    except PodflareError as exc:
        _, kind = refusals.classified(exc)
        yield Emit(encode(error_event(kind, str(exc))))
    return None


def _emitted(events: Sequence[Event]) -> Generator[Effect, Any, None]:
    if events:
        yield Emit(b"".join(encode(event) for event in events))


def _asked(step: Ask) -> Generator[Effect, Any, Reply]:
    attempt = 0
    while True:
        reply: Reply = yield Send(step.body, step.first)
        if reply.ok or step.first:
            return reply
        wait_s = refusals.retry_after_s(attempt, reply.status, reply.retry_after)
        if wait_s is None:
            return reply
        if reply.status is not None:
            yield Close(reply)
        yield Wait(wait_s)
        attempt += 1


def _relayed(turn: Turn, reply: Reply) -> Generator[Effect, Any, bool]:
    """One sampling to the client; whether the turn can go on."""
    reader = EventReader()
    while data := (yield Read(reply)):
        shown: list[Event] = []
        last = ""
        for event in reader.feed(data):
            shown += turn.take_event(event)
            if event["type"] in ("error", "message_stop"):
                last = event["type"]
                break
        yield from _emitted(shown)  # together, as they came: each piece costs more than its events
        if last:
            yield Close(reply)
            return last == "message_stop"
    turn.upstream_ended()
    return True


def _decoded(data: bytes) -> Any:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise ProtocolError("the model's API answered with something that is no JSON") from exc
    if not isinstance(found, dict):
        raise ProtocolError("the model's API answered with something that is no object")
    return found


def _error_of(data: bytes, status: int | None) -> Event:
    if status is None:
        return error_event("api_error", "the model's API could not be reached")
    try:
        found = _decoded(data)["error"]
        return error_event(str(found["type"]), str(found["message"]))
    except (ProtocolError, KeyError, TypeError):
        return error_event("api_error", f"the model's API answered with status {status}")
