"""Promise: a virtual machine that was kept goes on exactly, any number of times, after whatever end of its daemon."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import vms
from daemons import served
from podflare import AsyncClient, AsyncSandbox, Client, PodflareError, Sandbox, SnapshotNotFound, close_default_client
from podflare.engines.microvm.image.store import Image
from programs import Cli

pytestmark = list(vms.MARKS)

ALL_THAT_RUNS = """
import os, socket, subprocess, threading, time
state = {"step": 1}
ticks = []
def tick():
    while True:
        time.sleep(0.02)
        ticks.append(len(ticks))
threading.Thread(target=tick, daemon=True).start()
process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
one, other = socket.socketpair()
lost = open("/root/lost", "w+"); lost.write("deleted"); lost.flush(); os.unlink("/root/lost")
open("/root/file", "w").write("written")
"""
LOOK = """
before = len(ticks)
while len(ticks) == before: time.sleep(0.01)
process.stdin.write("echo\\n"); process.stdin.flush()
one.send(b"through")
lost.seek(0)
print(state, process.stdout.readline().strip(), other.recv(9).decode(), lost.read(), open("/root/file").read())
state["step"] += 1
"""
KEPT = "{'step': 1} echo through deleted written"
PAGE = Path(__file__).resolve().parents[3] / "docs" / "microvm.md"


def test_a_snapshot_outlives_its_killed_daemon(data_dir: Path, image: Image) -> None:
    """Threads, processes, sockets, deleted files and limits go on in each sandbox made of a snapshot, at once and by
    the next daemon; of one that was being taken when the daemon was killed nothing is left."""
    words = ("--engine", "process,microvm", "--image-dir", str(image.directory.parent.parent))
    environment = {"PODFLARE_API_KEYS": "one,two"}
    with pytest.raises(AssertionError), served(data_dir, *words, env=environment) as daemon:
        with Client(daemon.url, api_key="one") as client:
            source = open_sandbox(client)
            source.run_code(ALL_THAT_RUNS)
            kept = source.snapshot("mine", timeout=100)
            assert (kept.name, kept.engine, kept.ram_mib, kept.sandbox_id) == ("mine", "microvm", 700, source.id)
            assert source.run_code(LOOK).stdout == KEPT
            assert client.snapshots() == [kept] and 1 << 20 < kept.size_bytes < 1 << 30
            dying = threading.Thread(target=take_quietly, args=(source, "half"))
            dying.start()
            wait_until(lambda: any(data_dir.glob("d/instances/*/microvm/keeping-*")))
            os.kill(daemon.pid, signal.SIGKILL)
            dying.join(60)
    with served(data_dir, *words, env=environment) as daemon:
        wait_until(lambda: len(list((data_dir / "d" / "instances").iterdir())) == 1)
        assert not list(data_dir.glob("d/instances/*/microvm/keeping-*"))
        assert len(list((data_dir / "d" / "snapshots").iterdir())) == 1
        with Client(daemon.url, api_key="one") as client:
            assert client.snapshots() == [kept]
            with ThreadPoolExecutor(2) as pool:
                made = list(pool.map(lambda _: Sandbox(client=client, snapshot="mine"), range(2)))
            assert [one.run_code(LOOK).stdout for one in made] == [KEPT] * 2
            assert made[0].info().ram_mib == 700 and made[0].info().snapshot == "mine"
            assert (
                len({one.run_code("import os; print(os.urandom(8), os.uname().nodename)").stdout for one in made}) == 2
            )
        asyncio.run(others(daemon.url))
        by_command(daemon.url)
    assert list((data_dir / "d" / "snapshots").iterdir()) == []


def open_sandbox(client: Client) -> Sandbox:
    """The first one boots its template, which may take longer than a create waits."""
    deadline = time.monotonic() + vms.BOOT_TIMEOUT_S
    while True:
        try:
            return Sandbox(client=client, engine="microvm", ram_mib=700)
        except PodflareError:
            assert time.monotonic() < deadline


def take_quietly(sandbox: Sandbox, name: str) -> None:
    with contextlib.suppress(PodflareError):
        sandbox.snapshot(name)


async def others(url: str) -> None:
    """To another key there is no such snapshot; the owner's forks of a restored one work, in the async SDK."""
    async with AsyncClient(url, api_key="two") as client:
        assert await client.snapshots() == []
        with pytest.raises(SnapshotNotFound):
            await AsyncSandbox.create(client=client, snapshot="mine")
        with pytest.raises(SnapshotNotFound):
            await client.delete_snapshot("mine")
    async with AsyncClient(url, api_key="one") as client, AsyncSandbox(client=client, snapshot="mine") as sandbox:
        [child] = await sandbox.fork()
        assert (await child.run_code("print(state)")).stdout == "{'step': 1}"
        await child.close()
    close_default_client()


def by_command(url: str) -> None:
    """The command line lists it, runs a program in it, and removes it; the documentation's example works."""
    cli = Cli(url)
    cli.environment["PODFLARE_API_KEY"] = "one"
    done = cli("snapshot", "rm", "none")
    assert done.returncode == 1 and "no snapshot 'none'" in done.stderr
    assert "mine" in cli("snapshot", "ls").stdout
    done = cli("run", "--snapshot", "mine", "-c", "print(state)")
    assert (done.returncode, done.stdout) == (0, "{'step': 1}\n"), done.stderr
    assert cli("snapshot", "rm", "mine").stdout == "mine is removed\n"
    done = cli("run", "--snapshot", "mine", "-c", "1")
    assert done.returncode == 1 and "no snapshot 'mine'" in done.stderr
    [code] = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    example = subprocess.run(
        [sys.executable, "-c", code], env=cli.environment, capture_output=True, text=True, timeout=100
    )
    assert example.stdout.splitlines() == re.findall(r"# -> (.*)$", code, re.MULTILINE), example.stderr


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)  # a condition that has no event
