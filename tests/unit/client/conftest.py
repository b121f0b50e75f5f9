"""Clients of a scripted daemon."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from scripted_daemon import ScriptedDaemon

from podflare import AsyncClient, Client


@pytest.fixture
def daemon() -> ScriptedDaemon:
    return ScriptedDaemon()


@pytest.fixture
def client(daemon: ScriptedDaemon) -> Iterator[Client]:
    with Client("http://daemon.test/", transport=httpx.MockTransport(daemon)) as client:
        yield client


@pytest.fixture
def async_client(daemon: ScriptedDaemon) -> AsyncClient:
    async def answer(request: httpx.Request) -> httpx.Response:
        await request.aread()
        request.headers["x-async"] = "1"
        return daemon(request)

    return AsyncClient("http://daemon.test", transport=httpx.MockTransport(answer))
