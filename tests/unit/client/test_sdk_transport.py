"""client/_transport.py: who shares connections, and when they are closed."""

from __future__ import annotations

import asyncio

import pytest

from podflare.client import _transport
from podflare.client._config import Address


@pytest.fixture(autouse=True)
def nothing_shared() -> object:
    _transport.close_all_sync()
    yield
    _transport.close_all_sync()


def test_one_transport_per_daemon() -> None:
    """All synchronous users of an address share its connections; they stay after the last one for the next."""
    first, other = Address("http://a.test"), Address("http://b.test")
    one, two = _transport.acquire_sync(first), _transport.acquire_sync(first)
    assert one is two
    assert _transport.acquire_sync(other) is not one
    _transport.release_sync(first, one)
    _transport.release_sync(first, two)
    assert _transport.acquire_sync(first) is one


def test_unused_daemons_are_forgotten_in_turn() -> None:
    """Only a few addresses that nobody uses keep connections; those in use always do."""
    used = Address("http://used.test")
    kept = _transport.acquire_sync(used)
    for number in range(_transport.MAX_IDLE_TRANSPORTS + 3):
        address = Address(f"http://host{number}.test")
        _transport.release_sync(address, _transport.acquire_sync(address))
    assert len(_transport._shared) == _transport.MAX_IDLE_TRANSPORTS + 1
    assert _transport.acquire_sync(used) is kept


def test_closing_all_makes_the_next_use_a_new_one() -> None:
    """After close_all a lease is known to be stale, and giving it back late harms nobody."""
    address = Address("http://a.test")
    old, generation = _transport.acquire_sync(address), _transport.generation()
    _transport.close_all_sync()
    assert _transport.generation() != generation
    new = _transport.acquire_sync(address)
    _transport.release_sync(address, old)
    assert _transport._shared[address].users == 1 and new is not old


def test_event_loops_share_nothing() -> None:
    """Users within one loop share, the last one closes, another loop has its own."""
    address = Address("http://a.test")

    async def use() -> object:
        one, two = _transport.acquire_async(address), _transport.acquire_async(address)
        assert one is two
        await _transport.release_async(address, one)
        assert _transport.acquire_async(address) is one
        await _transport.release_async(address, one)
        await _transport.release_async(address, one)
        fresh = _transport.acquire_async(address)
        assert fresh is not one
        await _transport.release_async(address, fresh)
        return fresh

    assert asyncio.run(use()) is not asyncio.run(use())
