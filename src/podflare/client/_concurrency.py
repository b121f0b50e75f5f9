"""The few things that waiting and not waiting code do differently, as pairs of the same shape."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

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


async def outcome_async(call: Callable[..., Any], function: Callable[..., Any], *args: object) -> Any:
    """`call(function, *args)`: a coroutine function as a task of this loop, any other in a thread."""
    if inspect.iscoroutinefunction(function):
        return await call(function, *args)
    outcome = await in_thread_async(call, function, *args)
    return await outcome if inspect.isawaitable(outcome) else outcome


def outcome_sync(call: Callable[..., Any], function: Callable[..., Any], *args: object) -> Any:
    """In the caller's own thread: what the function uses (a database connection, say) may be bound to it."""
    return call(function, *args)


@contextlib.asynccontextmanager
async def beside_async() -> AsyncIterator[Callable[..., None]]:
    """Begin work beside the block: `begin(function, *args)`.  What still runs at its end is cancelled.

    Raises: the first error of the work, which cancels the block.
    """
    import anyio  # as above

    failures: list[Exception] = []

    async def one(work: Callable[..., Awaitable[None]], *args: object) -> None:
        try:
            await work(*args)
        except Exception as exc:  # noqa: BLE001  # as below
            failures.append(exc)
            tasks.cancel_scope.cancel()

    def begin(work: Callable[..., Awaitable[None]], *args: object) -> None:
        tasks.start_soon(one, work, *args)

    async with anyio.create_task_group() as tasks:
        try:
            yield begin
        except Exception as exc:  # noqa: BLE001  # raised below, outside the group, which would wrap it
            failures.append(exc)
        tasks.cancel_scope.cancel()
    if failures:
        raise failures[0]


@contextlib.contextmanager
def beside_sync() -> Iterator[Callable[..., None]]:
    """The same, one after the other: `begin` returns when the work is done."""
    yield lambda work, *args: work(*args)


async def each_async(
    work: Callable[[T], Awaitable[None]], items: Sequence[T], limit: int, stop: Callable[[], Awaitable[None]]
) -> None:
    """Do `work` for each item, at most `limit` at a time, and wait for all.

    Args:
        stop: has work that cannot be cancelled end soon; tasks can be cancelled and do not need it.
    Raises: the first error of `work`; the rest is cancelled, or not begun.
    """
    import anyio  # as above

    failures: list[Exception] = []

    async def one(item: T) -> None:
        async with limiter:
            try:
                await work(item)
            except Exception as exc:  # noqa: BLE001  # raised below, outside the group, which would wrap it
                failures.append(exc)
                tasks.cancel_scope.cancel()

    limiter = anyio.Semaphore(limit)
    async with anyio.create_task_group() as tasks:
        for item in items:
            tasks.start_soon(one, item)
    if failures:
        raise failures[0]


def each_sync(work: Callable[[T], None], items: Sequence[T], limit: int, stop: Callable[[], None]) -> None:
    """The same in threads.  Also on Ctrl-C, which reaches the waiting main thread, `stop` is called."""
    from concurrent.futures import Future, ThreadPoolExecutor, as_completed

    futures: list[Future[None]] = []
    with ThreadPoolExecutor(min(limit, max(1, len(items))), thread_name_prefix="podflare") as pool:
        try:
            # Ctrl-C can come as soon as the first has begun, while others are still handed out.
            for item in items:
                futures.append(pool.submit(work, item))
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop()
            raise
