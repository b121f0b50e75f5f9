"""File transfers on loopback, and what the daemon's memory does meanwhile."""

from __future__ import annotations

import os

from benchmarks.daemon import Daemon
from benchmarks.series import Series, timed_ms

MB = 1_000_000


def measure(full: bool) -> list[Series]:
    size = (512 if full else 128) * MB
    content = os.urandom(MB) * (size // MB)
    up, down = [], []
    with Daemon() as daemon, daemon.sandbox() as sandbox:
        sandbox.upload(b"warm", "/root/warm")
        for _ in range(5):
            up.append(size / MB / (timed_ms(lambda: sandbox.upload(content, "/root/file")) / 1000))
            down.append(size / MB / (timed_ms(lambda: sandbox.download("/root/file")) / 1000))
    note = f"one file of {size // MB} MB"
    return [
        Series("upload", "MB/s", tuple(up), ">= 300 MB/s", note=note),
        Series("download", "MB/s", tuple(down), ">= 300 MB/s", note=note),
    ]
