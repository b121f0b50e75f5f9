"""A whole daemon in the middle of a small internet (worlds), and sandboxes on it that try to reach things."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import vms
import worlds
from daemons import ServedDaemon, served
from podflare import Sandbox, Secret, close_default_client

CALL_S = 90.0


@dataclass
class Networked:
    """A daemon in a world."""

    world: worlds.World
    daemon: ServedDaemon
    folder: Path

    @contextmanager
    def sandbox(self, egress: bool | list[str] | None, secrets: dict[str, Secret] | None = None) -> Iterator[Sandbox]:
        """A sandbox whose first cell defines what attacks need."""
        try:
            with Sandbox(host=self.daemon.url, egress=egress, secrets=secrets) as made:
                made.upload(self.world.ca_file.read_bytes(), "/root/world.pem")
                assert made.run_code(TOOLS).ok
                self.world.requests(), self.world.queries()
                yield made
        finally:
            close_default_client()  # which keeps connections for the next call


@pytest.fixture(scope="module")
def networked(request: pytest.FixtureRequest, engine_name: str, private_temp: Path) -> Iterator[Networked]:
    """One daemon for this file, its gate running; it may be asked for private networks."""
    images = request.getfixturevalue("image").directory.parent.parent if engine_name == "microvm" else None
    folder = Path(tempfile.mkdtemp(prefix="w", dir=private_temp))
    folder.chmod(0o711)
    with worlds.world(folder) as world, serving(world, folder, images) as networked:
        if images is not None:
            for egress in (False, True):
                vms.boot_over_http(networked.daemon.url, egress=egress)
            close_default_client()
        yield networked


@contextmanager
def serving(
    world: worlds.World, folder: Path, images: Path | None = None, program: Sequence[str] = ()
) -> Iterator[Networked]:
    """A daemon in the middle of the world.

    Args:
        images: those of the virtual machines that it makes.
        program: for daemons.served.
    """
    env = {"PODFLARE_EGRESS_CA": str(world.ca_file), "PODFLARE_EGRESS_PRIVATE": "10.77.0.0/16"}
    words = ("--engine", "microvm", "--image-dir", str(images)) if images is not None else ()
    with served(folder, *words, env=env, gate=images is None, enter=world.enter, other=program) as daemon:
        yield Networked(world, daemon, folder)


def gate_of(daemon: int) -> int:
    """Pid of the daemon's gate; 0 if it has none now."""
    for path in Path(f"/proc/{daemon}/task/{daemon}").glob("children"):
        for pid in path.read_text().split():
            if b"podflare.egress.gate" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
    return 0


TOOLS = """
import contextlib, json, os, socket, ssl, struct, threading, time, urllib.error, urllib.request
PROXY = ("198.18.0.1", 3128)
CONTEXTS = {}

def attempt(act):
    "What came of it, and whether it took more than a moment."
    start = time.monotonic()
    try: found = act()
    except Exception as error: found = f"{type(error).__name__}: {error}"
    return found if time.monotonic() - start < 8 else f"slow: {found}"

def connect(host, port, family=0):
    def act():
        with (socket.create_connection((host, port), timeout=20) if not family else
              contextlib.closing(socket.socket(family))) as s:
            if family:
                s.settimeout(20); s.connect((host, port))
            s.sendall(b"GET /reached HTTP/1.0\\r\\n\\r\\n")
            return "REACHED" if s.recv(4) else "closed"
    return attempt(act)

def proxied(first_line):
    def act():
        with socket.create_connection(PROXY, timeout=20) as s:
            s.sendall(first_line.encode() + b"\\r\\nHost: api.example.com\\r\\nConnection: close\\r\\n\\r\\n")
            answer = b""
            while data := s.recv(4096):
                answer += data
                if answer.startswith(b"HTTP/1.1 200") and first_line.startswith("CONNECT"): break
            return answer.decode("latin-1")
    return attempt(act)

def fetch(url, headers={}, data=None, direct=False, cafile=None):
    def act():
        handlers = []
        if url.startswith("https"):  # reading all authorities is long where instructions are translated
            if cafile not in CONTEXTS: CONTEXTS[cafile] = ssl.create_default_context(cafile=cafile)
            handlers.append(urllib.request.HTTPSHandler(context=CONTEXTS[cafile]))
        if direct: handlers.append(urllib.request.ProxyHandler({}))
        opener = urllib.request.build_opener(*handlers)
        try:
            with opener.open(urllib.request.Request(url, headers=headers, data=data), timeout=30) as answer:
                return f"{answer.status} " + answer.read().decode("latin-1")
        except urllib.error.HTTPError as error:
            return f"{error.code} " + error.read().decode("latin-1")
    return attempt(act)
"""


def run(sandbox: Sandbox, code: str) -> dict[str, Any]:
    """Runs code that fills a dict `found`, with the tools at hand."""
    done = sandbox.run_code(f"found = {{}}\n{code}\nprint(json.dumps(found))", timeout=CALL_S)
    assert done.ok, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
