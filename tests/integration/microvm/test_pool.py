"""Promise: a daemon keeps virtual machines ready, and what it hands out is as good as new."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

import vms
from daemons import ServedDaemon, served
from podflare import Client, Sandbox, close_default_client

pytestmark = list(vms.MARKS)
READY_S = 60.0


def test_machines_wait_and_are_handed_out(data_dir: Path, serve_words: tuple[str, ...]) -> None:
    """A create takes a machine that waited, with the right time, what it asked for, and no variable of a rehearsal; it
    has the rate of a disk that the daemon was told."""
    rate = ("--disk-rate-mib", "1000", "--disk-rate-operations", "90000")
    with served(data_dir, *serve_words, "--pool-size", "1", *rate) as daemon, Client(daemon.url) as client:
        vms.boot_over_http(daemon.url)
        wait_for_one(daemon)
        if vms.vmm != "firecracker":
            assert any("bps-total=1048576000" in line and "iops-total=90000" in line for line in commands(daemon))
        before = pool(daemon)
        with Sandbox(client=client, ram_mib=300) as sandbox:
            assert pool(daemon)["hits"] == before["hits"] + 1
            assert sandbox.info().ram_mib == 300
            asked_s = time.time()
            told_s = float(sandbox.run_code("import time; print(time.time())").stdout)
            assert asked_s - 1 < told_s < time.time() + 0.1
            assert sandbox.run_code("print(*globals())").stdout.split()[-1] == "time"
    close_default_client()


def commands(daemon: ServedDaemon) -> Iterator[str]:
    """What its children were started with."""
    for pid in Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split():
        with contextlib.suppress(OSError):  # it has just ended
            yield Path(f"/proc/{pid}/cmdline").read_text()


def pool(daemon: ServedDaemon) -> dict[str, int]:
    found: dict[str, int] = httpx.get(f"{daemon.url}/v1/capacity").json()["pool"]
    return found


def wait_for_one(daemon: ServedDaemon) -> None:
    deadline = time.monotonic() + READY_S
    while not pool(daemon)["ready"]:
        assert time.monotonic() < deadline, pool(daemon)
        time.sleep(0.05)  # between two looks at what has no event
