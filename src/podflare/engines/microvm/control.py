"""The engine's conversation with the first process of a VM: one JSON object a line, an order and its answer.

User code may have taken over the whole VM, so what comes is hostile: bounded, and believed in nothing but its effects
on that VM.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import time
from collections.abc import Mapping
from typing import Any

import anyio

from podflare.engines.linux.waiting import wait_readable
from podflare.engines.microvm.vmm import Vm
from podflare.errors import DeadlineExceeded, MachineFailed

MAX_LINE_BYTES = 32 * 1024 * 1024
"""Of one answer: what a comparison of files needs (manifest.py)."""
TOKEN_BYTES = 32
MAX_STALE_BYTES = 16 * 1024 * 1024
"""What a restored VM may still send of its former conversation."""
_READ_BYTES = 256 * 1024
_SEED_BYTES = 64
NO_NETWORK: Mapping[str, Any] = {"is": "none"}


class Control:
    """One VM's control port.  Orders are answered one after the other."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = asyncio.Lock()
        self._rest = b""
        self._number = 0

    async def ask(self, order: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Give an order and return its answer.

        Raises: MachineFailed if it was refused, or answered by what is none; DeadlineExceeded.
        If cancelled: it may be carried out; its answer is not taken for that of the next one.
        """
        name = next(iter(order))
        try:
            with anyio.fail_after(timeout_s):
                async with self._lock:
                    self._number += 1
                    number = self._number
                    line = json.dumps({**order, "order": number}).encode() + b"\n"
                    await asyncio.get_running_loop().sock_sendall(self._sock, line)
                    while True:
                        answer = _decode(await self._line())
                        if answer.get("order") == number:
                            break
        except TimeoutError:
            raise DeadlineExceeded(f"a virtual machine did not answer {name!r} within {timeout_s:g} s") from None
        except OSError as exc:
            raise MachineFailed(f"a virtual machine cannot be reached: {exc}") from exc
        if "failed" in answer:
            raise MachineFailed(f"a virtual machine could not do {name!r}: {str(answer['failed'])[:500]}")
        return answer

    async def _line(self) -> bytes:
        while b"\n" not in self._rest:
            if len(self._rest) > MAX_LINE_BYTES:
                raise MachineFailed("a virtual machine answered with a line without end")
            data = await asyncio.get_running_loop().sock_recv(self._sock, _READ_BYTES)
            if not data:
                raise MachineFailed("the virtual machine is gone")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line


def _decode(line: bytes) -> dict[str, Any]:
    try:
        body = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise MachineFailed(f"a virtual machine answered with what is no JSON: {exc}") from exc
    if not isinstance(body, dict):
        raise MachineFailed("a virtual machine answered with what is no object")
    return body


async def renew(
    vm: Vm,
    control: Control,
    *,
    hostname: str,
    reseed: bool,
    timeout_s: float,
    network: Mapping[str, Any] = NO_NETWORK,
) -> None:
    """Make a restored VM another one than that which was saved, and its channel a new one.

    Args: network: what it has of a network, as guest/vm/network.py wants it.
    Clock, entropy, names; the bytes that were under way between guest and host at the moment it was saved are dropped
    on both sides up to a token that nobody else knows.  Afterwards Ready is unread on the channel.
    Raises: MachineFailed; DeadlineExceeded.
    """
    token = secrets.token_bytes(TOKEN_BYTES)
    order = {
        "time": time.time_ns(),
        "seed": secrets.token_hex(_SEED_BYTES),
        "hostname": hostname,
        "machine_id": secrets.token_hex(16),
        "token": token.hex(),
        "reseed": reseed,
        "network": network,
    }
    ends_s = time.monotonic() + timeout_s
    await control.ask({"restored": order}, timeout_s=timeout_s)
    try:
        # Not sooner: until then what comes is for the agent.
        await asyncio.get_running_loop().sock_sendall(vm.channel, token)
    except OSError as exc:
        raise MachineFailed(f"a restored virtual machine cannot be reached: {exc}") from exc
    await _skip_to(vm.channel, token, ends_s)
    await wait_readable(vm.channel, max(0.01, ends_s - time.monotonic()), "a restored guest was not ready")


async def _skip_to(channel: socket.socket, token: bytes, ends_s: float) -> None:
    """Read up to and with `token`, and not a byte more."""
    skipped = 0
    while skipped <= MAX_STALE_BYTES:
        await wait_readable(channel, max(0.01, ends_s - time.monotonic()), "a restored guest did not answer")
        try:
            data = channel.recv(_READ_BYTES, socket.MSG_PEEK)
            if not data:
                break
            at = data.find(token)
            found = at >= 0
            # What could be the beginning of it stays.
            size = at + len(token) if found else max(0, len(data) - len(token) + 1)
            if not size:
                await asyncio.sleep(0.001)  # a part of the token is there, and a socket tells no arrival of more
                continue
            skipped += len(channel.recv(size))
        except BlockingIOError:
            continue
        except OSError as exc:
            raise MachineFailed(f"a restored virtual machine is gone: {exc}") from exc
        if found:
            return
    raise MachineFailed("a restored virtual machine did not begin anew")
