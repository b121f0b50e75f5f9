"""The SDK: talks to a host daemon over HTTP, starts a private one where none is named.

Imports nothing of the daemon.  The public names are those of the package `podflare`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from podflare.client._async.client import AsyncClient as AsyncClient
    from podflare.client._sync.client import Client as Client

_HOMES = {"AsyncClient": "_async.client", "Client": "_sync.client"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def close_default_client(*, clear_disk_cache: bool = False) -> None:
    """Close the connections that synchronous code shares, and end the private daemon of this process.

    Sandboxes of the private daemon end with it; the next use starts a new one.

    Args:
        clear_disk_cache: accepted for programs that pass it; nothing is cached on disk.
    """
    from podflare.client import _embedded, _transport

    _transport.close_all_sync()
    _embedded.stop()
