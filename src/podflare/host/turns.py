"""Turns of what is no cell in the queues of sandboxes: a fork takes one, a merge one in each of two.

While a turn is held no cell of that sandbox runs.  Turns in several queues are taken at one moment, so that all of
them agree on who comes first and nobody waits in a circle.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from typing import Protocol

import anyio

from podflare.errors import DeadlineExceeded


class Turn:
    """A place in one queue."""

    def __init__(self) -> None:
        self.granted = asyncio.Event()
        self.over = asyncio.Event()
        self.scope = anyio.CancelScope()
        """Of all that is done within the turn; cancelled if the sandbox ends."""


class Queue(Protocol):
    """What a turn needs of its sandbox."""

    id: str

    def queue_up(self) -> AbstractContextManager[Turn]:
        """A place in the queue for the time of the block.  Raises: as touch; QuotaExceeded if too many wait."""

    def touch(self) -> None:
        """Raises: SandboxNotFound with the cause if the sandbox is ending."""


@asynccontextmanager
async def exclusive(*queues: Queue, wait_s: float, what: str) -> AsyncIterator[None]:
    """Within the block no cell runs in any of them: it begins when all cells before are over; those behind it wait.

    Raises: DeadlineExceeded (saying `what`) if they are not over within wait_s; as Queue.queue_up; SandboxNotFound if
        one of the sandboxes ends meanwhile, which cancels the block.
    """
    with ExitStack() as places:
        turns = [places.enter_context(queue.queue_up()) for queue in queues]
        with ExitStack() as scopes:
            for turn in turns:
                scopes.enter_context(turn.scope)
            try:
                with anyio.fail_after(wait_s):
                    for turn in turns:
                        await turn.granted.wait()
            except TimeoutError:
                busy = next(queue.id for queue, turn in zip(queues, turns, strict=True) if not turn.granted.is_set())
                text = f"sandbox {busy} was still running cells after {wait_s:g} s: {what}, nothing has changed"
                raise DeadlineExceeded(text) from None
            yield
        for queue, turn in zip(queues, turns, strict=True):
            if turn.scope.cancelled_caught:
                queue.touch()
