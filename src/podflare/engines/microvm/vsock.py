"""Connections to ports of a guest behind Firecracker's vsock device (Firecracker's docs/vsock.md).

The device offers a Unix socket; who connects there names a port, and has a stream to whoever listens in the guest.
It ends every connection when its VM is saved or restored, while those who listen in the guest go on.
"""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path

import anyio

from podflare.errors import DeadlineExceeded

CONNECT_RETRY_S = 0.005
ANSWER_TIMEOUT_S = 2.0
_MAX_ANSWER_BYTES = 32


async def connect(device: Path, number: int, *, timeout_s: float) -> socket.socket:
    """A non-blocking connection to a port, as soon as somebody in the guest listens.

    Raises: DeadlineExceeded if nobody does in time.
    If cancelled: there is none.
    """
    ends_s = time.monotonic() + timeout_s
    while True:
        try:
            return await _connect_now(device, number)
        except (OSError, EOFError) as exc:
            if time.monotonic() >= ends_s:
                raise DeadlineExceeded(
                    f"nobody in the virtual machine listened on port {number} within {timeout_s:g} s ({exc})"
                ) from exc
        await asyncio.sleep(CONNECT_RETRY_S)


async def _connect_now(device: Path, number: int) -> socket.socket:
    """Raises: OSError or EOFError if nobody listens yet, or there was no answer in time."""
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        await loop.sock_connect(sock, str(device))
        await loop.sock_sendall(sock, f"CONNECT {number}\n".encode())
        # Not wait_for: before Python 3.12 it swallows a cancellation that arrives together with the result.
        with anyio.fail_after(ANSWER_TIMEOUT_S):
            answer = await _answer(sock)
        if not answer.startswith(b"OK "):
            raise OSError(f"Firecracker answered {answer!r}")
    except TimeoutError:
        sock.close()
        raise EOFError("no answer") from None
    except BaseException:
        sock.close()
        raise
    return sock


async def _answer(sock: socket.socket) -> bytes:
    """One line, and not a byte of what follows it."""
    loop = asyncio.get_running_loop()
    line = b""
    while not line.endswith(b"\n"):
        byte = await loop.sock_recv(sock, 1)
        if not byte or len(line) > _MAX_ANSWER_BYTES:
            raise EOFError("no such port")
        line += byte
    return line
