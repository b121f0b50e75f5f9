"""A small internet for tests of egress, made of network namespaces: no address outside of this machine is ever asked.

    internet   name servers, HTTP and HTTPS servers, odd TCP servers, also at private and metadata addresses
    middle     where the gate, or a whole daemon, runs: `World.enter` are the words before a command
    inside     a sandbox's side without a sandbox: tun, listener, resolv.conf; `Inside.run` executes Python there

As an ordinary user all of it lies in a user namespace, in which the same user id goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from podflare.egress.certificates import make_authority

START_S = 30.0
RUN_S = 60.0
FOLDER = Path(__file__).parent

WEB = "93.184.216.34"
"""Serves HTTP (80), HTTPS (443, 8443, any name) and the odd ports of worlds/internet.py."""
OTHER_WEB = "93.184.216.35"
WEB6 = "2606:2800:220:2::34"
RESOLVER = "93.184.216.53"
PRIVATE = "10.77.0.5"
METADATA = "169.254.169.254"
OWN = "93.184.216.2"
"""The middle's own address, on which it serves HTTP at OWN_PORT, as on its loopback."""
OWN6 = "2606:2800:220:1::2"
OWN_PORT = 8080
SILENT = "93.184.220.99"
"""Swallows whatever it gets."""

ZONE: dict[str, list[str]] = {
    "api.example.com": [WEB],
    "other.example.com": [OTHER_WEB],
    "deep.sub.example.org": [WEB],
    "example.org": [WEB],
    "six.example.com": [WEB6],
    "evil.example": [OTHER_WEB],
    "private.example.com": [PRIVATE],
    "loop.example.com": ["127.0.0.1", "::1"],
    "mapped.example.com": ["::ffff:127.0.0.1", "::ffff:10.77.0.5", "64:ff9b::a4d:5", "2002:a4d:5::1"],
    "metadata.example.com": [METADATA],
    "own.example.com": [OWN],
    "silent.example.com": [SILENT],
    "wrong.example.com": [WEB],
    "own-mapped.example.com": [f"::ffff:{OWN}", "64:ff9b::5db8:d802"],
    "localhost.example.com": ["0.0.0.0"],
}
"""Name -> addresses.  `rebind.example.com` alternates between public and private; `mute.example.com` gets no answer."""


@dataclass
class World:
    """A running world.

    Attributes:
        enter: the words before a command that make it run in the middle.
        ca_file: PEM of the authority that signs the web servers' certificates.
    """

    enter: list[str]
    ca_file: Path
    _control: subprocess.Popen[bytes]

    def ask(self, **order: Any) -> Any:
        """What the internet has seen: `ask(op="queries")` and `ask(op="requests")`, each since the last time."""
        assert self._control.stdin is not None
        self._control.stdin.write(json.dumps(order).encode() + b"\n")
        self._control.stdin.flush()
        return _line(self._control, START_S)

    def queries(self) -> list[str]:
        """Names that reached its name servers, since the last call."""
        return list(self.ask(op="queries"))

    def requests(self) -> list[dict[str, Any]]:
        """HTTP requests that its servers got, since the last call."""
        return list(self.ask(op="requests"))

    def publish(self, path: str, content: bytes) -> None:
        """Have its web servers answer a GET of `path` with `content`, on every name."""
        file = self.ca_file.parent / "www" / path.strip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


class Inside:
    """A network namespace with the tun and the listener of a machine, and a process that runs Python in it."""

    def __init__(self, folder: Path, *, ca_pem: bytes | None = None, resolver: str = "198.18.0.1") -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="in", dir=folder)
        where = Path(self._folder.name)
        where.chmod(0o755)
        self.ca_file = where / "ca.pem"
        self.ca_file.write_bytes(ca_pem or b"")
        (where / "resolv.conf").write_text(f"nameserver {resolver}\noptions timeout:2 attempts:1\n")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [*_unshare(), sys.executable, str(FOLDER / "inside.py"), str(theirs.fileno()), str(where)],
                pass_fds=[theirs.fileno()],
                env=_environment(),
            )
        self._control = ours
        ours.settimeout(START_S)
        self.listener = -1
        self.tun = -1
        try:
            data, fds, _, _ = socket.recv_fds(ours, 100, 2)
            assert data == b"ready" and len(fds) == 2, data
            self.tun, self.listener = fds
        except BaseException:
            self.close()
            raise

    def run(self, code: str, timeout_s: float = RUN_S) -> str:
        """What `code` prints, errors included, run in a process of its own."""
        self._control.settimeout(timeout_s + 5)
        with tempfile.TemporaryFile(dir=self._folder.name) as out:
            socket.send_fds(self._control, [json.dumps([code, timeout_s]).encode()], [out.fileno()])
            assert self._control.recv(100) == b"done"
            out.seek(0)
            return out.read().decode("utf-8", "replace")

    def close(self) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait()
        for fd in (self.tun, self.listener):
            if fd >= 0:
                os.close(fd)
        self.tun = self.listener = -1
        self._folder.cleanup()


@contextlib.contextmanager
def world(folder: Path) -> Iterator[World]:
    """A running world whose files lie in `folder`."""
    certificate, key = make_authority()
    ca_file = folder / "world-ca.pem"
    ca_file.write_bytes(certificate)
    (folder / "world-ca.key").write_bytes(key)
    command = [*_unshare(), sys.executable, str(FOLDER / "middle.py"), str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment())
    try:
        assert _line(process, START_S) == "ready"
        enter = ["nsenter", "--target", str(process.pid), "--net", "--mount"]
        if os.geteuid() != 0:
            enter += ["--user", "--preserve-credentials"]
        yield World(enter, ca_file, process)
    finally:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        try:
            process.wait(10)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def _unshare() -> list[str]:
    words = ["unshare", "--net", "--mount"]
    return words if os.geteuid() == 0 else [*words, "--user", "--map-current-user", "--keep-caps"]


def _environment() -> dict[str, str]:
    paths = [str(FOLDER.parent), *(path for path in sys.path if path.endswith("src"))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}


def _line(process: subprocess.Popen[bytes], timeout_s: float) -> Any:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], timeout_s)[0], "the world does not answer"
    line = process.stdout.readline()
    assert line, "the world has ended"
    return json.loads(line)
