"""One daemon, one scripted API and one gateway for this folder; containers end with each test."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from anthropic_upstream import Upstream
from daemons import ServedDaemon, served
from gateways import ServedGateway, Way, gateway
from podflare import Client, close_default_client
from podflare.integrations.anthropic import AsyncLocalCodeExecution, LocalCodeExecution

WAYS = ("gateway", "gateway-async-stream", "middleware-stream", "middleware-async")
"""Each client, each shell, streaming and not, in as few as will do."""


@pytest.fixture(scope="session")
def folder(private_temp: Path) -> Path:
    """Where this folder's servers keep what they keep."""
    made = Path(tempfile.mkdtemp(prefix="g", dir=private_temp))
    made.chmod(0o711)
    return made


@pytest.fixture(scope="session")
def daemon(folder: Path) -> Iterator[ServedDaemon]:
    """A daemon for the sandboxes."""
    with served(folder) as running:
        yield running


@pytest.fixture(scope="session")
def shared_upstream() -> Iterator[Upstream]:
    """The model's API."""
    with Upstream() as running:
        yield running


@pytest.fixture(scope="session")
def shared_gateway(folder: Path, daemon: ServedDaemon, shared_upstream: Upstream) -> Iterator[ServedGateway]:
    """A gateway whose signs of life come quickly, and whose caps are small."""
    env = {
        "PODFLARE_GATEWAY_PING_SECONDS": "1",
        "PODFLARE_GATEWAY_STALL_SECONDS": "2",
        "PODFLARE_GATEWAY_MAX_FILE_MIB": "2",
        "PODFLARE_GATEWAY_MAX_BODY_MIB": "4",
    }
    with gateway(folder, "--upstream", shared_upstream.url, "--daemon", daemon.url, env=env) as running:
        yield running


@pytest.fixture
def upstream(shared_upstream: Upstream) -> Upstream:
    """The model's API, with nothing on record."""
    shared_upstream.requests.clear()
    shared_upstream.heads.clear()
    shared_upstream.rejected.clear()
    shared_upstream.failures.clear()
    return shared_upstream


@pytest.fixture(autouse=True)
def ended_containers(daemon: ServedDaemon) -> Iterator[None]:
    """The gateway would keep the containers of a test for an hour."""
    yield
    with Client(daemon.url) as client:
        for sandbox in client.list_sandboxes():
            client.destroy_sandbox(sandbox.id)
    close_default_client()


@pytest.fixture
def front(shared_gateway: ServedGateway, upstream: Upstream) -> Way:
    """A client of the gateway."""
    return Way(shared_gateway.url)


@pytest.fixture
def execution(daemon: ServedDaemon) -> Iterator[LocalCodeExecution]:
    """Middleware on the daemon."""
    made = LocalCodeExecution(host=daemon.url)
    yield made
    made.close()


@pytest.fixture
def async_execution(daemon: ServedDaemon) -> Iterator[AsyncLocalCodeExecution]:
    """Middleware for waiting clients."""
    made = AsyncLocalCodeExecution(host=daemon.url)
    yield made
    made.close()


@pytest.fixture(params=WAYS)
def way(
    request: pytest.FixtureRequest,
    shared_gateway: ServedGateway,
    upstream: Upstream,
    execution: LocalCodeExecution,
    async_execution: AsyncLocalCodeExecution,
) -> Way:
    """A way to use the tool; tests that name none run in all of WAYS."""
    kinds = {"streaming": "stream" in request.param, "asynchronous": "async" in request.param}
    if "gateway" in request.param:
        return Way(shared_gateway.url, **kinds)
    return Way(upstream.url, async_execution if kinds["asynchronous"] else execution, **kinds)
