"""The command line as a user has it: a process of its own, talking to a daemon of this folder's."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from programs import PROGRAM, Cli

START_S = 40.0
STOP_S = 20.0


@pytest.fixture(scope="session")
def cli(private_temp: Path) -> Iterator[Cli]:
    """A daemon on a Unix socket, and the command line that uses it."""
    folder = Path(tempfile.mkdtemp(prefix="c", dir=private_temp))
    folder.chmod(0o711)
    address = f"unix:{folder}/s"
    words = [*PROGRAM, "serve", "--uds", f"{folder}/s", "--data-dir", f"{folder}/d", "--pool-size", "2"]
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
    from podflare import Client

    deadline = time.monotonic() + START_S
    with Client(address) as client:
        while not client.healthz():
            assert daemon.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)  # the socket appears without an event
