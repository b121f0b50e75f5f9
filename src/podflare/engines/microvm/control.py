"""The engine's conversation with the first process of a VM: one JSON object a line, an order and its answer.

How it and the host's conversation begin anew, in a VM that was restored or whose channels did not survive a capture.

User code may have taken over the whole VM, so what comes is hostile: bounded, and believed in nothing but its effects
on that VM.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
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
TRY_TIMEOUTS_S = (1.0, 2.0, 5.0, 60.0)
"""For a conversation to begin over channels that were just opened, from one try to the next."""
_READ_BYTES = 256 * 1024
_SEED_BYTES = 64
_LONG_BYTES = 256 * 1024
"""An answer from here on is decoded in a thread: it takes long."""
NO_NETWORK: Mapping[str, Any] = {"is": "none"}


class Control:
    """One VM's control port.  Orders are answered one after the other."""

    def __init__(self, sock: socket.socket, *, stale: bool = False) -> None:
        """Args: stale: what is left of a former conversation comes first in both directions, cut anywhere."""
        self._sock = sock
        self._lock = asyncio.Lock()
        self._rest = b""
        self._stale = stale
        # An answer to an order of the former conversation must not pass for one of this.
        self._number = secrets.randbits(32)

    def move(self, sock: socket.socket) -> None:
        """Go on over another socket.  Precondition: within `quiet`."""
        self._sock, self._rest, self._stale = sock, b"", True

    @contextlib.asynccontextmanager
    async def quiet(self) -> AsyncIterator[None]:
        """Within the block no order of anybody else is under way."""
        async with self._lock:
            yield

    async def ask(self, order: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Give an order and return its answer.

        Raises: MachineFailed if it was refused, or answered by what is none; DeadlineExceeded.
        If cancelled: it may be carried out; its answer is not taken for that of the next one.
        """
        try:
            with anyio.fail_after(timeout_s):
                async with self._lock:
                    return await self._exchange(order)
        except TimeoutError:
            raise _silence(order, timeout_s) from None

    async def ask_in_quiet(self, order: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """As `ask`, for who has `quiet`."""
        try:
            with anyio.fail_after(timeout_s):
                return await self._exchange(order)
        except TimeoutError:
            raise _silence(order, timeout_s) from None

    async def _exchange(self, order: Mapping[str, Any]) -> dict[str, Any]:
        self._number += 1
        line = json.dumps({**order, "order": self._number}).encode() + b"\n"
        if self._stale:
            line = b"\n" + line  # the guest may have had the first half of an order
        try:
            await asyncio.get_running_loop().sock_sendall(self._sock, line)
            answer: dict[str, Any] = {}
            while answer.get("order") != self._number:
                try:
                    line = await self._line()
                    if len(line) < _LONG_BYTES:
                        answer = _decode(line)
                    else:
                        answer = await asyncio.get_running_loop().run_in_executor(None, _decode, line)
                except ValueError as exc:
                    if not self._stale:
                        raise MachineFailed(f"a virtual machine answered with what is no answer: {exc}") from exc
            self._stale = False
        except OSError as exc:
            raise MachineFailed(f"a virtual machine cannot be reached: {exc}") from exc
        if "failed" in answer:
            raise MachineFailed(f"a virtual machine could not do {next(iter(order))!r}: {str(answer['failed'])[:500]}")
        return answer

    async def _line(self) -> bytes:
        parts, size = [self._rest], len(self._rest)
        try:
            while b"\n" not in parts[-1]:
                if size > MAX_LINE_BYTES:
                    raise MachineFailed("a virtual machine answered with a line without end")
                data = await asyncio.get_running_loop().sock_recv(self._sock, _READ_BYTES)
                if not data:
                    raise MachineFailed("the virtual machine is gone")
                parts.append(data)
                size += len(data)
        finally:
            self._rest = b"".join(parts)
        line, _, self._rest = self._rest.partition(b"\n")
        return line


def _silence(order: Mapping[str, Any], timeout_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(f"a virtual machine did not answer {next(iter(order))!r} within {timeout_s:g} s")


def _decode(line: bytes) -> dict[str, Any]:
    """Raises: ValueError."""
    try:
        body = json.loads(line)
    except RecursionError as exc:
        raise ValueError("nested too deep") from exc
    if not isinstance(body, dict):
        raise ValueError("no object")
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

    def restored(token: str) -> dict[str, Any]:
        order = {"time": time.time_ns(), "seed": secrets.token_hex(_SEED_BYTES), "reseed": reseed, "token": token}
        identity = {"hostname": hostname, "machine_id": secrets.token_hex(16), "network": network}
        return {"restored": {**order, **identity}}

    async with control.quiet():
        await _begin_anew(vm, control, restored, timeout_s)


async def rejoin(vm: Vm, control: Control, *, timeout_s: float) -> None:
    """Go on with a VM whose channels a capture has ended, over new ones.  It stays what it is.

    File transfers that were under way are over; what the guest keeps for the next cell is kept.  Afterwards Ready is
    unread on the channel.  Precondition: within `control.quiet`; no cell runs.
    Raises: MachineFailed; DeadlineExceeded.
    """
    await _begin_anew(vm, control, lambda token: {"rejoined": {"token": token}}, timeout_s)


async def hold_still(vm: Vm, control: Control, *, timeout_s: float) -> None:
    """Have nothing run on in a VM that was just restored but its first process; nobody can speak with its guest.

    Precondition: it does not go on yet, or its channels do not survive that.
    Raises: MachineFailed; DeadlineExceeded.
    """
    order = {"freeze": True}
    if vm.channels_survive:
        # Under way before the VM moves: then it is the first thing that happens in it.
        asked = asyncio.ensure_future(control.ask(order, timeout_s=timeout_s))
        try:
            await asyncio.sleep(0)
            await vm.resume()
            await asked
        finally:
            asked.cancel()
        return
    await vm.resume()
    async with control.quiet():
        await _begin_anew(vm, control, lambda token: order, timeout_s, with_guest=False)


async def _begin_anew(
    vm: Vm, control: Control, order: Callable[[str], dict[str, Any]], timeout_s: float, *, with_guest: bool = True
) -> None:
    ends_s = time.monotonic() + timeout_s
    for number, try_s in enumerate(TRY_TIMEOUTS_S, 1):
        left_s = ends_s - time.monotonic()
        last = vm.channels_survive or number == len(TRY_TIMEOUTS_S) or left_s <= try_s
        try:
            await _try_anew(vm, control, order, left_s if last else try_s, with_guest=with_guest)
            return
        except (MachineFailed, DeadlineExceeded):
            # A guest that hears of the end of all its connections after it has taken a new one ends that, too.
            if last:
                raise


async def _try_anew(
    vm: Vm, control: Control, order: Callable[[str], dict[str, Any]], timeout_s: float, *, with_guest: bool
) -> None:
    token = secrets.token_bytes(TOKEN_BYTES)
    ends_s = time.monotonic() + timeout_s
    if not vm.channels_survive:
        await vm.open_channels(timeout_s=timeout_s)
        control.move(vm.control)
    await control.ask_in_quiet(order(token.hex()), timeout_s=max(0.01, ends_s - time.monotonic()))
    if not with_guest:
        return
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
