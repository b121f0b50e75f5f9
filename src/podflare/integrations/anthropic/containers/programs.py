"""Code that calls the client's tools: a cell that goes on, or waits, from one request of the client to the next."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import anyio

from podflare.client._calls import ResultBuilder
from podflare.client._types import ToolCallEvent
from podflare.errors import CellNotFound, Conflict, MachineFailed, PodflareError
from podflare.integrations.anthropic.hosted.blocks import CALLER, Block, Call
from podflare.integrations.anthropic.hosted.rounds import Paused
from podflare.wire.events import TOOL_CANCELLED

if TYPE_CHECKING:
    from podflare import AsyncSandbox, ExecResult

CELL_S = 90.0
"""Of the code's own time; waiting for tools is not counted."""
ANSWER_S = 270.0
"""After it a call that has no answer raises TimeoutError in the code."""
QUIET_S = 0.03
"""Calls that come closer together than this, as asyncio.gather makes them, are handed out together."""


class Program:
    """One cell and the calls that it waits for.  `drive` runs in a task of its own until the cell is over."""

    def __init__(self, call: Call, sandbox: AsyncSandbox, functions: Sequence[str]) -> None:
        self._call = call
        self._sandbox = sandbox
        self._functions = list(functions)
        self._waiting: dict[str, ToolCallEvent] = {}
        """By the id under which the client knows a call."""
        self._over = False
        self._done: ExecResult | None = None
        self._failure: PodflareError | None = None
        self._news = anyio.Event()
        self._scope = anyio.CancelScope()

    async def drive(self) -> None:
        """Read what the cell tells, until its end.  Raises nothing."""
        builder = ResultBuilder()
        try:
            with self._scope:
                code = str(self._call.input["code"])
                stream = self._sandbox.run_code_stream(
                    code, timeout=CELL_S, tools=self._functions, tool_timeout=ANSWER_S
                )
                async with contextlib.aclosing(stream) as events:
                    async for event in events:
                        if isinstance(event, ToolCallEvent):
                            self._waiting[f"toolu_local_{secrets.token_hex(12)}"] = event
                        elif event.type == TOOL_CANCELLED:
                            self._drop(event.data)
                        else:
                            builder.add([event])
                            continue
                        self._tell()
            self._done = builder.build()
        except PodflareError as exc:
            self._failure = exc
        except Exception as exc:  # noqa: BLE001  # it would end the task group, and with it everybody's containers
            self._failure = MachineFailed(f"the code could not be followed: {type(exc).__name__}")
        finally:
            self._waiting.clear()
            self._over = True
            self._tell()

    def _drop(self, data: Any) -> None:
        call_id = data.get("call_id") if isinstance(data, Mapping) else None
        self._waiting = {key: event for key, event in self._waiting.items() if event.call_id != call_id}

    def _tell(self) -> None:
        news, self._news = self._news, anyio.Event()
        news.set()

    def abort(self) -> None:
        """Interrupt the code."""
        self._scope.cancel()

    async def go_on(self, answers: Mapping[str, str]) -> ExecResult | Paused:
        """Give answers, by the ids of the client, and wait for the end or for calls that need the client.

        An answer that nobody waits for any more is dropped: the code has had its TimeoutError.
        Raises: PodflareError if the sandbox fails.
        """
        for key, text in answers.items():
            event = self._waiting.pop(key, None)
            if event is not None:
                with contextlib.suppress(Conflict, CellNotFound):
                    await self._sandbox.answer_tool_call(event.cell_id, event.call_id, result=text)
        while not self._over:
            waiting = list(self._waiting)
            news = self._news
            with anyio.move_on_after(QUIET_S if waiting else None):
                await news.wait()
                continue
            return Paused(tuple(self._block(key) for key in waiting))
        if self._done is None:
            raise self._failure or MachineFailed("the code was interrupted")
        return self._done

    def _block(self, key: str) -> Block:
        event = self._waiting[key]
        caller = {"type": CALLER, "tool_id": self._call.id}
        return {"type": "tool_use", "id": key, "name": event.name, "input": event.input, "caller": caller}
