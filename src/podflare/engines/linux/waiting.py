"""Waiting on the event loop, always with a limit, and so that a cancelled wait leaves nothing without an owner."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import anyio

from podflare.errors import DeadlineExceeded


def resolve(future: asyncio.Future[None]) -> None:
    """Reader callback: the future is done, once."""
    if not future.done():
        future.set_result(None)


async def wait_readable(sock: socket.socket, timeout_s: float, what: str) -> None:
    """Return when `sock` can be read or is at its end.  Raises: DeadlineExceeded(what) after timeout_s."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    fd = sock.fileno()  # kept: who cancels this may have closed the socket already
    loop.add_reader(fd, resolve, ready)
    try:
        # Not wait_for: before Python 3.12 it swallows a cancellation that arrives together with the result.
        done, _ = await asyncio.wait([ready], timeout=timeout_s)
        if not done:
            raise DeadlineExceeded(f"{what} within {timeout_s:g} s")
    finally:
        loop.remove_reader(fd)


async def run_to_end(*steps: Awaitable[object]) -> None:
    """Await all of them, one after the other, and return after that, however often this is cancelled meanwhile.

    For taking away what failed: whoever waits for the failure may be cancelled while it is taken away.
    Raises: what a step raises; CancelledError at the end.
    """

    async def run() -> None:
        for step in steps:
            await step

    task = asyncio.get_running_loop().create_task(run())
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as exc:
            cancelled = exc
    task.result()
    if cancelled is not None:
        raise cancelled


Made = TypeVar("Made")


async def make_owned(
    making: Coroutine[Any, Any, Made], *, timeout_s: float, discard: Callable[[Made], Awaitable[None]]
) -> Made:
    """Run `making` and return what it made.

    Args:
        making: undoes its own part when it is cancelled or fails.
        discard: takes away what was made all the same when nobody waits for it any more.
    Raises: TimeoutError after timeout_s; what `making` raises.
    If cancelled, or on a timeout: nothing that it made exists.
    """
    task = asyncio.get_running_loop().create_task(making)
    try:
        done, _ = await asyncio.wait([task], timeout=timeout_s)
        if not done:
            raise TimeoutError
    except BaseException:
        # anyio cancels again and again until the scope is left; the clean-up must run to its end all the same.
        with anyio.CancelScope(shield=True):
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled() and task.exception() is None:
                await discard(task.result())
        raise
    return task.result()


async def to_the_end(work: Coroutine[Any, Any, Made]) -> Made:
    """Run `work` to its end and return its result.

    If cancelled: once it has ended, whose result or failure nobody hears of then.
    """
    task = asyncio.get_running_loop().create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                continue  # anyio says it again and again
        if not task.cancelled():
            task.exception()
        raise
