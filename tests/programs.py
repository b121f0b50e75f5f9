"""Runs the `podflare` command as a user does: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = [sys.executable, "-m", "podflare"]


class Cli:
    """The command with `address` as its default daemon."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.environment = {**os.environ, "PODFLARE_HOSTD_URL": address, "PYTHONWARNINGS": "error"}

    def __call__(self, *words: str, stdin: str = "", path: str = "") -> subprocess.CompletedProcess[str]:
        """Args: path: where it finds programs; empty: where this process does."""
        environment = {**self.environment, "PATH": path} if path else self.environment
        return subprocess.run(
            [*PROGRAM, *words], input=stdin, env=environment, capture_output=True, text=True, timeout=60
        )

    def start(self, *words: str) -> subprocess.Popen[str]:
        """A command that runs while the test looks on.  The caller waits for it."""
        return subprocess.Popen(
            [*PROGRAM, *words], env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
