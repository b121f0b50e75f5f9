"""The few things that waiting and not waiting code do differently, as pairs of the same shape."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def in_thread_async(function: Callable[..., T], *args: object) -> T:
    """Call something that blocks, without blocking the event loop.

    If cancelled: the call goes on in its thread, its result is dropped.
    """
    import anyio.to_thread  # here, so that the synchronous SDK starts without it

    return await anyio.to_thread.run_sync(function, *args, abandon_on_cancel=True)


def in_thread_sync(function: Callable[..., T], *args: object) -> T:
    return function(*args)


def shield_async() -> contextlib.AbstractContextManager[object]:
    """What is inside runs to its end, also in a cancelled task.  It must be bounded by itself."""
    import anyio  # as above

    return anyio.CancelScope(shield=True)


def shield_sync() -> contextlib.AbstractContextManager[object]:
    """Synchronous code cannot be cancelled."""
    return contextlib.nullcontext()
