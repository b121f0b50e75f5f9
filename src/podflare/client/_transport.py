"""Connections to daemons, shared by everything in a process (or an event loop) that talks to the same one.

Hands out httpx transports, not httpx clients: the redirect, cookie and auth layers of a client would cost more
than a cell.  Whoever acquires one releases it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import ssl
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any, Protocol

import anyio
import anyio.lowlevel
import httpx

from podflare.client import _config
from podflare.client._config import Address

KEEPALIVE_S = 60.0
MAX_CONNECTIONS = 1000
MAX_KEPT_CONNECTIONS = 32
MAX_IDLE_TRANSPORTS = 8
"""Daemons that nobody uses now but whose connections are kept, in case."""

_LIMITS = httpx.Limits(
    max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_KEPT_CONNECTIONS, keepalive_expiry=KEEPALIVE_S
)


class SyncTransport(Protocol):
    """What the SDK needs of HTTP.  httpx.HTTPTransport and httpx.MockTransport fit."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send it; the response's body is not read yet."""

    def close(self) -> None:
        """Release every connection."""


class AsyncTransport(Protocol):
    """The same for asynchronous code."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send it; the response's body is not read yet."""

    async def aclose(self) -> None:
        """Release every connection."""


@functools.lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()


def _options(address: Address) -> dict[str, Any]:
    # Loading certificates takes longer than a whole sandbox: only where TLS is used.
    verify = _tls() if address.base_url.startswith("https://") else False
    return {"uds": address.uds, "retries": 1, "limits": _LIMITS, "verify": verify, "trust_env": False}


def timeouts(read_s: float) -> dict[str, float | None]:
    """The timeouts of one request, as httpx transports want them."""
    return {
        "connect": _config.CONNECT_TIMEOUT_S,
        "read": read_s,
        "write": _config.WRITE_TIMEOUT_S,
        "pool": _config.POOL_TIMEOUT_S,
    }


@dataclass
class _Shared:
    transport: httpx.HTTPTransport
    users: int = 0


_lock = threading.Lock()
_shared: dict[Address, _Shared] = {}
"""By address, least recently released first."""
_generation = 0
_sockets: weakref.WeakSet[Any] = weakref.WeakSet()
"""Open sockets of the synchronous transports, for a forked child to close."""


def generation() -> int:
    """Changes when every acquired transport has become useless: after a fork, after `close_all_sync`."""
    return _generation


def acquire_sync(address: Address) -> SyncTransport:
    with _lock:
        entry = _shared.get(address)
        if entry is None:
            entry = _shared[address] = _Shared(httpx.HTTPTransport(**_options(address)))
        entry.users += 1
        return entry.transport


def release_sync(address: Address, transport: SyncTransport) -> None:
    """The connections stay open for the next user of the address, within MAX_IDLE_TRANSPORTS addresses."""
    with _lock:
        entry = _shared.pop(address, None)
        if entry is None:
            return
        if entry.transport is not transport:  # acquired before a fork or a close_all
            _shared[address] = entry
            return
        entry.users -= 1
        _shared[address] = entry
        idle = [key for key, value in _shared.items() if value.users == 0]
        closing = [_shared.pop(key) for key in idle[:-MAX_IDLE_TRANSPORTS]]
    for old in closing:
        old.transport.close()


def close_all_sync() -> None:
    """Close every connection of synchronous code.  Objects still in use connect anew."""
    global _generation
    with _lock:
        _generation += 1
        entries = list(_shared.values())
        _shared.clear()
    for entry in entries:
        entry.transport.close()


def note_socket_sync(response: httpx.Response) -> None:
    """Remember the response's connection."""
    stream = response.extensions.get("network_stream")
    if stream is not None and (sock := stream.get_extra_info("socket")) is not None:
        _sockets.add(sock)


def note_socket_async(response: httpx.Response) -> None:
    """An event loop does not cross a fork, so there is nothing to remember."""


def _forget_in_child() -> None:
    # A forked child shares the parent's connections: using one would mix up two conversations, and keeping
    # one open hides from the daemon that the parent is gone.  Another thread may have held any lock.
    global _lock, _generation
    _lock = threading.Lock()
    _generation += 1
    _inherited.extend(_shared.values())
    _shared.clear()
    for sock in list(_sockets):
        with contextlib.suppress(OSError):
            os.close(sock.detach())


_inherited: list[_Shared] = []
"""In a forked child: kept so that no destructor runs on them."""
os.register_at_fork(after_in_child=_forget_in_child)
atexit.register(close_all_sync)


@dataclass
class _AsyncShared:
    transport: httpx.AsyncHTTPTransport
    users: int = 0


@dataclass
class _LoopState:
    shared: dict[Address, _AsyncShared] = field(default_factory=dict)


_loop_state: anyio.lowlevel.RunVar[_LoopState] = anyio.lowlevel.RunVar("podflare_transports")


def acquire_async(address: Address) -> AsyncTransport:
    try:
        state = _loop_state.get()
    except LookupError:
        state = _LoopState()
        _loop_state.set(state)
    entry = state.shared.get(address)
    if entry is None:
        entry = state.shared[address] = _AsyncShared(httpx.AsyncHTTPTransport(**_options(address)))
    entry.users += 1
    return entry.transport


async def release_async(address: Address, transport: AsyncTransport) -> None:
    """The last user closes: a loop's end cannot be waited for, and would leave open sockets."""
    state = _loop_state.get(_LoopState())
    entry = state.shared.get(address)
    if entry is None or entry.transport is not transport:
        await transport.aclose()
        return
    entry.users -= 1
    if entry.users == 0:
        del state.shared[address]
        await entry.transport.aclose()
