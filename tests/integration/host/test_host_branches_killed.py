"""A daemon that is killed amid forks and merges, or has no time to end: what the next finds, what is left."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

START_S = 60.0
END_S = 20.0
SERVE = """
import json, pathlib, sys
from podflare.serve import serve_forever
sys.exit(serve_forever(data_dir=pathlib.Path(sys.argv[1]), **json.loads(sys.argv[2])))
"""


class Served:
    """One daemon process over the process engine."""

    def __init__(self, data_dir: Path, **settings: float) -> None:
        self.uds = f"{data_dir}/s"
        given = {"uds": self.uds, "announce": True, "pool_size": 0, **settings}
        command = [sys.executable, "-c", SERVE, f"{data_dir}/d", json.dumps(given)]
        with open(f"{data_dir}/log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        ready, _, _ = select.select([self.process.stdout], [], [], START_S)
        line = self.process.stdout.readline() if ready else b""
        assert line, Path(f"{data_dir}/log").read_text()[-3000:]
        assert json.loads(line)["ready"]

    def client(self) -> httpx.Client:
        return httpx.Client(transport=httpx.HTTPTransport(uds=self.uds), base_url="http://podflare", timeout=30)

    def end(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.communicate(timeout=END_S)


@pytest.fixture
def serve(data_dir: Path) -> Iterator[Callable[..., Served]]:
    """Starts daemons on one data directory; ends what a failed test left."""
    made: list[Served] = []

    def start(**settings: float) -> Served:
        made.append(Served(data_dir, **settings))
        return made[-1]

    yield start
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()


def work(client: httpx.Client, seen: dict[str, set[str]]) -> None:
    """Fork and merge until the daemon is gone; notes which ids were told and which winners were merged away."""
    try:
        root = client.post("/v1/sandboxes").json()["id"]
        seen["living"].add(root)
        while True:
            answer = client.post(f"/v1/sandboxes/{root}/fork", json={"n": 3})
            if answer.status_code != 200:  # as deep as it goes
                root = client.post("/v1/sandboxes").json()["id"]
                seen["living"].add(root)
                continue
            one, two, three = answer.json()["children"]
            seen["living"] |= {one, two, three}
            client.post(f"/v1/sandboxes/{two}/exec", json={"code": "x = bytes(10**6); open('/root/f', 'wb').write(x)"})
            assert client.post(f"/v1/sandboxes/{one}/merge/{two}").json()["applied"]
            seen["merging"].add(one)
            assert client.post(f"/v1/sandboxes/{root}/merge_into/{one}").status_code == 204
            seen["merged"].add(one)
            for loser in (two, three):
                client.delete(f"/v1/sandboxes/{loser}")
    except httpx.TransportError:
        return


@pytest.mark.timeout(110)
@pytest.mark.parametrize("after_s", [0.05, 0.3, 0.8])
def test_killed_at_any_moment(serve, data_dir, after_s):
    """Every id that was told is known to the next daemon with one cause; machines, layers and processes are gone."""
    one = serve()
    seen: dict[str, set[str]] = {"living": set(), "merging": set(), "merged": set()}
    with one.client() as client:
        worker = threading.Thread(target=work, args=(client, seen))
        worker.start()
        deadline = time.monotonic() + END_S
        while not seen["living"] and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(after_s)  # the moment of the kill is what is varied here
        one.end(signal.SIGKILL)
        worker.join(END_S)
    assert not worker.is_alive() and seen["living"]
    two = serve()
    instances = Path(f"{data_dir}/d/instances")
    with two.client() as client:
        for sandbox in seen["living"]:
            answer = client.get(f"/v1/sandboxes/{sandbox}")
            cause = answer.json()["error"]
            assert answer.status_code == 404
            restarted, merged = "the daemon that ran it has ended" in cause, "merged into sbx_" in cause
            assert restarted or merged or "it was closed" in cause, cause
            assert merged or sandbox not in seen["merged"]
            assert not merged or sandbox in seen["merging"]
            assert client.delete(f"/v1/sandboxes/{sandbox}").status_code == 204
        assert client.get("/v1/sandboxes").json() == {"sandboxes": []}
        deadline = time.monotonic() + END_S
        while len(os.listdir(instances)) > 1 and time.monotonic() < deadline:
            time.sleep(0.01)  # what the first one left is removed behind the start
        (instance,) = os.listdir(instances)
        assert os.listdir(instances / instance / "process" / "machines") == []
        fresh = client.post("/v1/sandboxes").json()["id"]
        assert len(client.post(f"/v1/sandboxes/{fresh}/fork", json={"n": 2}).json()["children"]) == 2
    two.end(signal.SIGTERM)
    assert os.listdir(instances) == []


def test_an_end_without_time(serve, data_dir):
    """A daemon that could not close its sandboxes in the time that it has for that clears up all the same."""
    one = serve(shutdown_s=0.0)
    with one.client() as client:
        parent = client.post("/v1/sandboxes").json()["id"]
        children = client.post(f"/v1/sandboxes/{parent}/fork", json={"n": 3}).json()["children"]
        start = {"code": "import subprocess; subprocess.Popen(['sleep', '1000'])"}
        for sandbox in (parent, *children):
            assert client.post(f"/v1/sandboxes/{sandbox}/exec", json=start).status_code == 200
    one.end(signal.SIGTERM)
    assert one.process.returncode == 0
    assert os.listdir(f"{data_dir}/d/instances") == []
