"""The tool calls of one cell that wait for answers: their ids, bounds and time limits.  Knows no HTTP and no link."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from podflare.errors import CallNotFound, Conflict, ProtocolError
from podflare.wire import events
from podflare.wire.api import ToolAnswer
from podflare.wire.codec import encode_object
from podflare.wire.messages import ToolCall, ToolCancel, ToolResult
from podflare.wire.tools import MAX_PENDING_BYTES, MAX_PENDING_CALLS, Tools

MAX_UNTOLD_BYTES = 2 * MAX_PENDING_BYTES
"""Of calls that the client was not sent yet, also those that do not wait any more."""
EVENT_BYTES = 1024
"""What a call costs besides its input."""

CANCELLED = "cancelled"
TIMED_OUT = "timed_out"


@dataclass(frozen=True)
class _Pending:
    number: int
    """The guest's own for this call, which the client never sees."""
    name: str
    size: int
    timer: asyncio.TimerHandle


class ToolCalls:
    """Owned by its cell, which tells it what the guest says and closes it."""

    def __init__(
        self,
        cell_id: str,
        tools: Tools,
        timeout_s: float,
        *,
        emit: Callable[[str, dict[str, Any]], None],
        reply: Callable[[ToolResult], None],
        changed: Callable[[bool], None],
    ) -> None:
        """`emit` tells the client, `reply` the guest; `changed` says whether the cell waits for calls from now on."""
        self._prefix = "call_" + cell_id.rpartition("_")[2]
        self._tools = tools
        self._timeout_s = timeout_s
        self._emit = emit
        self._reply = reply
        self._changed = changed
        self._issued = 0
        self._bytes = 0
        self._untold = 0
        self._pending: dict[str, _Pending] = {}
        self._ids: dict[int, str] = {}

    def on_call(self, message: ToolCall) -> None:
        """Raises: ProtocolError for a tool that the cell does not have, or a number that is in use."""
        if message.name not in self._tools:
            raise ProtocolError(f"call of a tool {message.name!r} that the cell does not have")
        if message.call in self._ids:
            raise ProtocolError(f"tool call {message.call} twice")
        size = len(encode_object(message.input))
        refused = ""
        if len(self._pending) >= MAX_PENDING_CALLS or self._bytes + size > MAX_PENDING_BYTES:
            refused = f"{len(self._pending)} tool calls with {self._bytes} bytes of input wait already in this cell"
        elif self._untold > MAX_UNTOLD_BYTES:
            refused = "the client does not take the events of this cell"
        if refused:
            self._reply(ToolResult(message.call, error="RuntimeError", message=refused))
            return
        self._issued += 1
        self._untold += size + EVENT_BYTES
        call_id = f"{self._prefix}_{self._issued}"
        timer = asyncio.get_running_loop().call_later(self._timeout_s, self._time_out, call_id)
        self._pending[call_id] = _Pending(message.call, message.name, size, timer)
        self._ids[message.call] = call_id
        self._bytes += size
        self._emit(events.TOOL_CALL, {"call_id": call_id, "name": message.name, "input": message.input})
        if len(self._pending) == 1:
            self._changed(True)

    def all_told(self) -> None:
        """The client took every event so far."""
        self._untold = 0

    def on_cancel(self, message: ToolCancel) -> None:
        """Of a call that has its answer already: nothing, the two have crossed."""
        call_id = self._ids.get(message.call)
        if call_id is not None:
            self._take(call_id)
            self._emit(events.TOOL_CANCELLED, {"call_id": call_id, "reason": CANCELLED})

    def answer(self, answer: ToolAnswer) -> None:
        """Raises: Conflict if this call waits no longer; CallNotFound if there was none of this id."""
        if answer.call_id not in self._pending:
            prefix, _, number = answer.call_id.rpartition("_")
            issued = prefix == self._prefix and number.isascii() and number.isdecimal()
            if issued and 1 <= int(number) <= self._issued:
                raise Conflict(
                    f"tool call {answer.call_id} waits no longer: it was answered, cancelled or timed out, "
                    "or its cell is over"
                )
            raise CallNotFound(f"the cell made no tool call {answer.call_id!r}")
        number_in_guest = self._take(answer.call_id).number
        self._reply(
            ToolResult(number_in_guest, value=answer.result, error=answer.error_type, message=answer.error_message)
        )

    def _time_out(self, call_id: str) -> None:
        call = self._take(call_id)
        text = f"no answer to {call.name}() within {self._timeout_s:g} s"
        self._reply(ToolResult(call.number, error="TimeoutError", message=text))
        self._emit(events.TOOL_CANCELLED, {"call_id": call_id, "reason": TIMED_OUT})

    def _take(self, call_id: str) -> _Pending:
        call = self._pending.pop(call_id)
        call.timer.cancel()
        del self._ids[call.number]
        self._bytes -= call.size
        if not self._pending:
            self._changed(False)
        return call

    def close(self) -> None:
        """The cell is over: no call waits any more.  Idempotent."""
        for call in self._pending.values():
            call.timer.cancel()
        self._pending.clear()
        self._ids.clear()
