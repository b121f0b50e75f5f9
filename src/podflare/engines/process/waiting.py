"""Waiting for descriptors on the event loop, always with a limit."""

from __future__ import annotations

import asyncio
import socket

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
        await asyncio.wait_for(ready, timeout_s)
    except asyncio.TimeoutError as exc:
        raise DeadlineExceeded(f"{what} within {timeout_s:g} s") from exc
    finally:
        loop.remove_reader(fd)
