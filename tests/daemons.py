"""Runs `podflare serve` as an operator does: a process of its own, found by the line it announces."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from podflare import Sandbox, close_default_client

START_S = 40.0
STOP_S = 20.0
program: Sequence[str] = ("-m", "podflare")
"""What Python is started with; set by pytest's option --vmm."""


@dataclass
class ServedDaemon:
    """A daemon that accepts connections at `url`."""

    url: str
    pid: int


@contextlib.contextmanager
def served(
    folder: Path,
    *words: str,
    env: Mapping[str, str] | None = None,
    gate: bool = False,
    enter: Sequence[str] = (),
    other: Sequence[str] = (),
) -> Iterator[ServedDaemon]:
    """Serve on a free port of loopback, or where `words`, further options, say; what it keeps is under `folder`.

    Args:
        gate: start the process for egress, too, which then lives as long as the daemon.
        enter: words before the command that lead into another network: then it serves on a Unix socket.
        other: in the place of `program`.
    Without a pool: what is refilled after a test would look like a leak of that test.
    """
    where = ["--uds", f"{folder}/s"] if enter else [] if "--uds" in words else ["--host", "127.0.0.1", "--port", "0"]
    command = [*enter, sys.executable, *(other or program), "serve", *where, "--announce"]
    command += ["--data-dir", f"{folder}/d", "--pool-size", "0", *words]
    descriptor, name = tempfile.mkstemp(prefix="log", dir=folder)
    log = Path(name)
    with os.fdopen(descriptor, "wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stream, env={**os.environ, **(env or {})}
        )
    assert process.stdout is not None
    try:
        assert select.select([process.stdout], [], [], START_S)[0], log.read_text()
        line = process.stdout.readline()
        assert line, log.read_text()
        daemon = ServedDaemon(json.loads(line)["address"], process.pid)
        if gate:
            Sandbox(host=daemon.url, egress=True).close()
            close_default_client()
        yield daemon
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            process.stdout.close()
    assert code == 0, log.read_text()
