"""Ports of a guest behind Firecracker's vsock device, each as one socket that lasts.

The device ends every connection when its VM is saved or restored, while who holds the socket keeps it: a relay
connects to the port again.  Bytes that were under way at that moment are lost, as the device loses them.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

import anyio

CONNECT_RETRY_S = 0.01
ANSWER_TIMEOUT_S = 2.0
_MAX_ANSWER_BYTES = 32
_READ_BYTES = 256 * 1024


class PortRelay:
    """Keeps `outer` connected with the guest's port `number`, until `aclose`."""

    def __init__(self, device: Path, number: int) -> None:
        self._device, self._number = device, number
        self.outer, self._inner = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        for sock in (self.outer, self._inner):
            sock.setblocking(False)
        self._task: asyncio.Task[None] | None = None
        self._left = b""
        """Read from `outer`'s holder and not yet taken by a guest."""

    def start(self) -> None:
        """Begin to connect.  From now on the device's socket file has to exist."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(OSError, EOFError):
                guest = await connect(self._device, self._number)
                try:
                    if await self._carry(guest):
                        return
                finally:
                    guest.close()
            await asyncio.sleep(CONNECT_RETRY_S)

    async def _carry(self, guest: socket.socket) -> bool:
        """Carry bytes both ways until one side ends.  True if that was the holder's, for which all ends."""
        loop = asyncio.get_running_loop()
        inward = loop.create_task(self._inward(guest))
        outward = loop.create_task(self._outward(guest))
        try:
            await asyncio.wait([inward, outward], return_when=asyncio.FIRST_COMPLETED)
            return inward.done() and inward.exception() is None
        finally:
            for task in (inward, outward):
                task.cancel()
            await asyncio.gather(inward, outward, return_exceptions=True)

    async def _inward(self, guest: socket.socket) -> None:
        """From the holder to the guest.  Returns at the holder's end; raises at the guest's."""
        loop = asyncio.get_running_loop()
        while True:
            if not self._left:
                self._left = await loop.sock_recv(self._inner, _READ_BYTES)
                if not self._left:
                    return
            await loop.sock_sendall(guest, self._left)
            self._left = b""

    async def _outward(self, guest: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(guest, _READ_BYTES):
            await loop.sock_sendall(self._inner, data)
        raise EOFError

    async def aclose(self) -> None:
        """Stop, and end the conversation of `outer`'s holder.  Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for sock in (self._inner, self.outer):
            sock.close()


async def connect(device: Path, number: int) -> socket.socket:
    """A connection to a port on which somebody in the guest listens (Firecracker's docs/vsock.md).

    Raises: OSError or EOFError if nobody does yet, or there was no answer in time.
    """
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
