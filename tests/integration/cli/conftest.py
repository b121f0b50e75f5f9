"""The command line as a user has it: a process of its own, talking to a daemon of this folder's."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from podflare import Client, close_default_client
from programs import PROGRAM, Cli

START_S = 40.0
STOP_S = 20.0


@pytest.fixture(scope="session")
def cli(private_temp: Path) -> Iterator[Cli]:
    """A daemon on a Unix socket, and the command line that uses it."""
    folder = Path(tempfile.mkdtemp(prefix="c", dir=private_temp))
    folder.chmod(0o711)
    address = f"unix:{folder}/s"
    # Without a pool: what is refilled after a test would look like a leak of that test.
    words = [*PROGRAM, "serve", "--uds", f"{folder}/s", "--data-dir", f"{folder}/d", "--pool-size", "0"]
    log = folder / "log"
    with log.open("wb") as stream:
        daemon = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
    try:
        _wait_healthy(address, daemon, log)
        yield Cli(address)
    finally:
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(STOP_S) == 0, log.read_text()


def _wait_healthy(address: str, daemon: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    with Client(address) as client:
        while not client.healthz():
            assert daemon.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)  # the socket appears without an event


@pytest.fixture(autouse=True)
def no_kept_connections() -> Iterator[None]:
    """The SDK keeps a connection for the next call; tests that use it in this process give it back."""
    yield
    close_default_client()
