"""The daemon as a process: its socket, its announcement, its end, and what the next one makes of a killed one."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

FAKE_DAEMON = Path(__file__).with_name("fake_daemon.py")
END_S = 30.0


class Running:
    """One daemon process."""

    def __init__(self, data_dir: Path, env: dict[str, str] | None = None, **settings: object) -> None:
        given = {"uds": str(data_dir / "s"), "data_dir": str(data_dir / "data"), "pool_size": 0, "announce": True}
        given.update(settings)
        self.process = subprocess.Popen(
            [sys.executable, str(FAKE_DAEMON), json.dumps(given)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})},
        )
        self.uds = given["uds"]

    def ready(self) -> dict[str, object]:
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read().decode()
        return json.loads(line)

    def client(self) -> httpx.Client:
        return httpx.Client(transport=httpx.HTTPTransport(uds=self.uds), base_url="http://podflare", timeout=30)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Signal it; its exit code and what it logged."""
        self.process.send_signal(number)
        _, log = self.process.communicate(timeout=END_S)
        return self.process.returncode, log.decode()


@pytest.fixture
def daemon(data_dir):
    """Starts daemons; kills what a failed test left."""
    made: list[Running] = []

    def start(**settings: object) -> Running:
        made.append(Running(data_dir, **settings))
        return made[-1]

    yield start
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()


def test_announces_when_it_accepts_and_serves_only_its_user(daemon, data_dir):
    """The ready line comes once connections are served; the socket has mode 0600; SIGTERM removes all of it."""
    one = daemon()
    line = one.ready()
    assert line["ready"] is True and line["address"] == f"unix://{one.uds}" and line["pid"] == one.process.pid
    assert stat.S_IMODE(os.stat(one.uds).st_mode) == 0o600
    with one.client() as client:
        assert client.get("/v1/healthz").text == "ok"
    code, _ = one.end()
    assert code == 0
    assert not os.path.exists(one.uds) and os.listdir(data_dir / "data" / "instances") == []


def test_tcp_port_zero_is_announced(daemon):
    """With port 0 the ready line tells the real address."""
    one = daemon(uds=None, host="127.0.0.1", port=0)
    address = one.ready()["address"]
    assert httpx.get(f"{address}/v1/healthz", timeout=10).text == "ok"
    assert one.end()[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_streams_with_their_cause(daemon, number):
    """A daemon told to end finishes running cells with an exit event that says why, then exits in time."""
    one = daemon()
    one.ready()
    got: list[str] = []
    started = threading.Event()

    def run() -> None:
        with one.client() as client:
            sandbox = client.post("/v1/sandboxes").json()["id"]
            code = {"code": "print('on', flush=True)\nwhile True: pass"}
            with client.stream("POST", f"/v1/sandboxes/{sandbox}/exec", json=code) as answer:
                for line in answer.iter_lines():
                    got.append(line)
                    started.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(30)
    start = time.monotonic()
    assert one.end(number)[0] == 0
    thread.join(30)
    assert time.monotonic() - start < 8
    last = json.loads(got[-1])
    assert (last["type"], last["data"]) == ("exit", 137) and "the daemon was shut down" in got[-2]


def test_second_daemon_on_a_served_socket_is_refused(daemon):
    """A socket that somebody serves is not taken over; the first daemon goes on."""
    one = daemon()
    one.ready()
    two = daemon()
    _, log = two.process.communicate(timeout=END_S)
    assert two.process.returncode == 1 and b"another process serves" in log
    with one.client() as client:
        assert client.get("/v1/healthz").text == "ok"
    one.end()


def test_file_in_place_of_the_socket_is_not_removed(daemon, data_dir):
    """Something that is not a socket at the socket's path is an error, never deleted."""
    (data_dir / "s").write_text("precious")
    one = daemon()
    _, log = one.process.communicate(timeout=END_S)
    assert one.process.returncode == 1 and b"is not a socket" in log
    assert (data_dir / "s").read_text() == "precious"


def test_served_port_is_an_error_with_the_address(daemon):
    """A port in use is one clear line."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        one = daemon(uds=None, host="127.0.0.1", port=taken.getsockname()[1])
        _, log = one.process.communicate(timeout=END_S)
    assert one.process.returncode == 1 and b"cannot listen on 127.0.0.1" in log and b"Traceback" not in log


def test_open_address_without_keys_is_refused(daemon):
    """No keys and an address that others can reach: the daemon does not start, and says what to do."""
    one = daemon(uds=None, host="0.0.0.0", port=0)
    _, log = one.process.communicate(timeout=END_S)
    assert one.process.returncode == 1 and b"PODFLARE_API_KEYS" in log


def test_disabled_authentication_warns(daemon):
    """Authentication switched off on an open address starts with a warning in the log."""
    one = daemon(uds=None, host="0.0.0.0", port=0, env={"PODFLARE_AUTH_DISABLED": "1"})
    one.ready()
    assert "DISABLED" in one.end()[1]


def test_ends_with_its_parent(daemon, data_dir):
    """A daemon given a parent ends by itself, with all it made, when that process is killed."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]) as parent:
        one = daemon(parent_pid=parent.pid)
        one.ready()
        with one.client() as client:
            client.post("/v1/sandboxes")
        parent.kill()
        _, log = one.process.communicate(timeout=END_S)
    assert one.process.returncode == 0, log
    assert os.listdir(data_dir / "data" / "instances") == []


def test_parent_that_is_gone_already(daemon):
    """A daemon whose parent ended before it looked ends at once instead of staying for ever."""
    with subprocess.Popen(["true"]) as parent:
        pass
    one = daemon(parent_pid=parent.pid)
    _, log = one.process.communicate(timeout=END_S)
    assert one.process.returncode == 0, log


def test_restart_after_kill_remembers_ids_and_reaps(daemon, data_dir):
    """After kill -9 the next daemon takes the stale socket, removes what was left, and knows why old ids are gone."""
    one = daemon()
    one.ready()
    with one.client() as client:
        lost = client.post("/v1/sandboxes").json()["id"]
        closed = client.post("/v1/sandboxes").json()["id"]
        client.delete(f"/v1/sandboxes/{closed}")
    old = os.listdir(data_dir / "data" / "instances")
    one.process.kill()
    one.process.communicate()
    _remove_fake_leftovers()
    two = daemon()
    two.ready()
    assert not set(old) & set(os.listdir(data_dir / "data" / "instances"))
    with two.client() as client:
        gone = client.post(f"/v1/sandboxes/{lost}/exec", json={"code": "1"})
        assert gone.status_code == 404 and "the daemon that ran it has ended" in gone.json()["error"]
        assert "it was closed" in client.get(f"/v1/sandboxes/{closed}").json()["error"]
        assert [client.delete(f"/v1/sandboxes/{one}").status_code for one in (lost, closed)] == [204, 204]
        assert client.delete("/v1/sandboxes/sbx_" + "0" * 32).status_code == 404
    two.end()


def _remove_fake_leftovers() -> None:
    """The fake engine's own temporary directories, which only a living one removes."""
    import shutil
    import tempfile

    for path in Path(tempfile.gettempdir()).glob("podflare-*"):
        shutil.rmtree(path, ignore_errors=True)


def test_two_daemons_share_a_data_directory(daemon, data_dir):
    """A daemon that starts beside a living one touches nothing of it."""
    one = daemon()
    one.ready()
    with one.client() as client:
        sandbox = client.post("/v1/sandboxes").json()["id"]
        two = daemon(uds=str(data_dir / "s2"))
        two.ready()
        two.end()
        body = client.post(f"/v1/sandboxes/{sandbox}/exec", json={"code": "print('still here')"}).text
        assert "still here" in body
    one.end()


def test_json_log_is_one_object_a_line(daemon):
    """With the JSON format every log line parses, with the fields of its event."""
    one = daemon(log_format="json")
    one.ready()
    with one.client() as client:
        client.post("/v1/sandboxes", headers={"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"})
        client.get("/v1/x%0Ainjected")
    lines = [json.loads(line) for line in one.end()[1].splitlines()]
    claimed = next(line for line in lines if line["event"] == "sandbox claimed")
    assert claimed["source"] == "on_demand" and claimed["trace_id"] == "a" * 32 and claimed["ms"] > 0
