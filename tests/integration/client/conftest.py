"""The SDK against real daemons."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import vms
from daemons import ServedDaemon, served
from networks import networked as networked
from podflare import Sandbox, close_default_client


@pytest.fixture(scope="session")
def sdk_daemon(request: pytest.FixtureRequest, engine_name: str, private_temp: Path) -> Iterator[ServedDaemon]:
    """A daemon on loopback for this folder's tests."""
    folder = Path(tempfile.mkdtemp(prefix="s", dir=private_temp))
    folder.chmod(0o711)
    if engine_name == "process":
        with served(folder, gate=True) as daemon:
            yield daemon
        return
    with served(folder, *request.getfixturevalue("serve_words")) as daemon:
        vms.boot_over_http(daemon.url)
        yield daemon


@pytest.fixture(autouse=True)
def shared_connections() -> Iterator[None]:
    """Close what the SDK keeps open for the process, private daemon included."""
    yield
    close_default_client()


@pytest.fixture
def sandbox(sdk_daemon: ServedDaemon) -> Iterator[Sandbox]:
    """A sandbox on that daemon."""
    with Sandbox(host=sdk_daemon.url) as sandbox:
        yield sandbox
