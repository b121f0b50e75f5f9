"""The command line as a user has it: a process of its own, talking to a daemon of this folder's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemons import served
from podflare import close_default_client
from programs import Cli


@pytest.fixture(scope="session")
def cli(private_temp: Path) -> Iterator[Cli]:
    """The command line with a daemon as its default."""
    folder = Path(tempfile.mkdtemp(prefix="c", dir=private_temp))
    folder.chmod(0o711)
    with served(folder, gate=True) as daemon:
        yield Cli(daemon.url)


@pytest.fixture(autouse=True)
def no_kept_connections() -> Iterator[None]:
    """The SDK keeps a connection for the next call; tests that use it in this process give it back."""
    yield
    close_default_client()
