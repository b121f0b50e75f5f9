"""Promise: without keys the daemon serves loopback or its own user only, and no web page; broken requests harm nobody."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from daemons import ServedDaemon, served


@pytest.fixture(scope="module")
def daemon(private_temp: Path) -> Iterator[ServedDaemon]:
    """A daemon on loopback, without keys."""
    import shutil

    folder = Path(tempfile.mkdtemp(prefix="o", dir=private_temp))
    folder.chmod(0o711)
    with served(folder) as found:
        yield found
    shutil.rmtree(folder)


OPEN_TO_ALL = {
    "every address": ["--host", "0.0.0.0"], "every IPv6 address": ["--host", "::"], "an empty address": ["--host", ""],
    "an address of another network": ["--host", "192.0.2.1"], "a mapped address": ["--host", "::ffff:0.0.0.0"],
    "an old way to write it": ["--host", "0"],
}  # fmt: skip


def test_it_does_not_open_to_everybody(private_temp, record):
    """Without keys no address but loopback is served, however it is written."""
    found = {}
    for name, words in OPEN_TO_ALL.items():
        with tempfile.TemporaryDirectory(prefix="o", dir=private_temp) as folder:
            command = [sys.executable, "-m", "podflare", "serve", "--port", "0", "--data-dir", f"{folder}/d", *words]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
                found[name] = "held" if done.returncode else f"broke: {done.stdout}"
            except subprocess.TimeoutExpired:
                found[name] = "broke: it serves"
    record(found)


PAGES = {
    "another origin": {"Origin": "https://evil.example"},
    "a page of a file": {"Origin": "null"},
    "a page at another port": {"Origin": "http://127.0.0.1:1"},
    "a name that resolves to loopback": {"Host": "evil.example", "Origin": "http://evil.example"},
    "a name without an origin": {"Host": "evil.example"},
    "a name with a port": {"Host": "evil.example:80"},
    "loopback's name within another": {"Host": "127.0.0.1.evil.example"},
    "localhost within another": {"Host": "localhost.evil.example"},
    "credentials before the name": {"Origin": "http://127.0.0.1@evil.example"},
    "an origin that begins alike": {"Origin": "http://127.0.0.1.evil.example"},
    "a cross-site fetch": {"Sec-Fetch-Site": "cross-site"},
    "a link from a page": {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
    "a form of a page": {"Origin": "https://evil.example", "Content-Type": "text/plain"},
    "a form without an origin": {"Sec-Fetch-Site": "same-site", "Content-Type": "application/x-www-form-urlencoded"},
    "a preflight": {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"},
}  # fmt: skip


def test_web_pages_cannot_drive_it(daemon, record):
    """No request that a browser sends for a page of another origin, or a name that leads here, makes or shows a sandbox."""
    found = {}
    with httpx.Client(base_url=daemon.url, timeout=30) as client:
        for name, headers in PAGES.items():
            method = "OPTIONS" if name == "a preflight" else "POST"
            answer = client.request(method, "/v1/sandboxes", headers=headers, content=b"{}")
            allowed = {key for key in answer.headers if key.lower().startswith("access-control-allow")}
            found[name] = (
                "held"
                if answer.status_code in (400, 403, 404, 405, 421) and not allowed
                else f"broke: {answer.status_code} {allowed}"
            )
        assert client.get("/v1/sandboxes").json() == {"sandboxes": []}
    record(found)


_HEAD = b"POST /v1/sandboxes HTTP/1.1\r\nHost: 127.0.0.1\r\n"
REQUESTS = {
    "two lengths": _HEAD + b"Content-Length: 2\r\nContent-Length: 40\r\n\r\n{}" + b"GET /v1/sandboxes HTTP/1.1\r\n\r\n",
    "a length and chunks": _HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
    "a negative length": _HEAD + b"Content-Length: -1\r\n\r\n{}",
    "a huge length": _HEAD + b"Content-Length: 99999999999999999999\r\n\r\n{}",
    "a huge chunk": _HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n{}",
    "chunks twice": _HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "a line that is folded": _HEAD + b"X: y\r\n z\r\nContent-Length: 2\r\n\r\n{}",
    "a bare carriage return": _HEAD + b"X: y\rContent-Length: 2\r\n\r\n{}",
    "a null in a header": _HEAD + b"X: \0\r\nContent-Length: 2\r\n\r\n{}",
    "a header of a megabyte": _HEAD + b"X: " + b"y" * (1 << 20) + b"\r\n\r\n",
    "a hundred thousand headers": _HEAD + b"".join(b"X-%d: y\r\n" % n for n in range(100_000)) + b"\r\n",
    "a path of a megabyte": b"GET /" + b"x" * (1 << 20) + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "an absolute path elsewhere": b"GET http://evil.example/v1/sandboxes HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a tunnel": b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: 127.0.0.1:22\r\n\r\n",
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(200),
    "HTTP/2 without asking": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(50),
    "HTTP/0.9": b"GET /v1/sandboxes\r\n\r\n",
    "a request that never ends": _HEAD + b"Content-Length: 1000\r\n\r\n{",
    "garbage": os.urandom(4000),
    "a deep body": _HEAD + b"Content-Length: 200000\r\n\r\n" + b"[" * 200_000,
    "an upgrade": b"GET /v1/sandboxes HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
}  # fmt: skip


def test_broken_requests_harm_nobody(daemon, record):
    """What is no request, or two at once, or without end is refused or dropped, and the daemon serves the next one."""
    found = {}
    address = daemon.url.removeprefix("http://").rsplit(":", 1)
    with httpx.Client(base_url=daemon.url, timeout=30) as client:
        for name, request in REQUESTS.items():
            with socket.create_connection((address[0], int(address[1])), timeout=2) as connection:
                try:
                    connection.sendall(request)
                    connection.settimeout(0.3)
                    said = b""
                    while piece := connection.recv(65536):
                        said += piece
                except (OSError, TimeoutError):
                    pass
            alive = client.get("/v1/sandboxes").json()["sandboxes"]
            for one in alive:
                client.delete(f"/v1/sandboxes/{one['id']}")
            made = bool(alive) or b'"id"' in said
            well = client.get("/v1/healthz").status_code == 200
            found[name] = f"broke: {said[:200]!r}, well: {well}" if made or not well else "held"
        assert client.get("/v1/sandboxes").json() == {"sandboxes": []}
    record(found)


UNFOLDING = {
    "lists": b"[],",
    "objects": b"{},",
    "lists in lists": b"[" * 900 + b"]" * 900 + b",",
    "numbers": b"1,",
    "keys": b'"":0,',
}


def test_bodies_that_unfold_are_refused_before_they_do(daemon, record):
    """A body of 30 MiB that would become millions of values costs the daemon little more than its bytes."""
    found = {}
    before = _peak_kib(daemon.pid)
    with httpx.Client(base_url=daemon.url, timeout=60) as client:
        for name, piece in UNFOLDING.items():
            inner = piece * ((30 << 20) // len(piece))
            body = b'{"x":{%s"":0}}' % inner if name == "keys" else b'{"x":[%s0]}' % inner
            answer = client.post("/v1/sandboxes", content=body)
            refused = answer.status_code == 400 and "more than 1000000 values" in answer.json()["error"]
            found[f"a body of {name}"] = "held" if refused else f"broke: {answer.text[:200]}"
    grown = _peak_kib(daemon.pid) - before
    found["the daemon's memory"] = "held" if grown < 250 * 1024 else f"broke: {grown >> 10} MiB more"
    record(found)


def _peak_kib(pid: int) -> int:
    with open(f"/proc/{pid}/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
