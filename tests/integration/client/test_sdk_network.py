"""What programs in a sandbox do with a network: packages, forks, merges, and a gate that dies under them."""

from __future__ import annotations

import io
import os
import signal
import time
import zipfile
from pathlib import Path

import pip
import pytest

import worlds
from networks import CALL_S, Networked, gate_of, run, serving
from podflare import Sandbox, Secret
from wheels import make_wheel

WAIT_S = 30.0
HELLO = "found['hello'] = fetch('http://api.example.com/hello')"


@pytest.fixture(scope="module")
def index(networked: Networked, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A package index of one wheel on the world's web servers; gives a zip of pip, for sandboxes may have none."""
    wheel = make_wheel(tmp_path_factory.mktemp("wheels"), "tiny", "1.2", {"tiny.py": "NAME = 'tiny of the index'\n"})
    page = f'<!DOCTYPE html><a href="/files/{wheel.name}">{wheel.name}</a>'
    networked.world.publish("/simple/tiny/index", page.encode())
    networked.world.publish(f"/files/{wheel.name}", wheel.read_bytes())
    packed = io.BytesIO()
    folder = Path(pip.__file__).parent
    with zipfile.ZipFile(packed, "w") as archive:
        for file in folder.rglob("*"):
            if file.suffix != ".pyc" and file.is_file():
                archive.write(file, f"pip/{file.relative_to(folder)}")
    return packed.getvalue()


def install(sandbox: Sandbox, index: bytes, options: str, before: str = ":") -> str:
    """Installs the wheel with pip into a fresh directory and imports it."""
    sandbox.upload(index, "/root/pip.zip")
    unpack = "python3 -c 'import pip' 2>&- || test -d pip || python3 -m zipfile -e pip.zip pip"
    done = sandbox.run_code(
        f"""{unpack}; {before}
rm -rf lib; export PYTHONPATH=/root/pip PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
python3 -m pip install -q --no-cache-dir --retries 0 --timeout 20 --target lib {options} tiny 2>&1
PYTHONPATH=lib python3 -c 'import tiny; print(tiny.NAME)'""",
        "bash",
        timeout=CALL_S,
    )
    return done.stdout


@pytest.mark.any_engine
def test_pip_installs_through_the_proxy_settings_and_without(networked: Networked, index: bytes) -> None:
    """pip gets a package over HTTPS from an allowed index, by the variables that sandboxes have and without them."""
    options = "--cert /root/world.pem -i https://api.example.com/simple"
    with networked.sandbox(["api.example.com"]) as sandbox:
        assert install(sandbox, index, options) == "tiny of the index"
        bare = "unset HTTP_PROXY HTTPS_PROXY http_proxy https_proxy"
        assert install(sandbox, index, options, before=bare) == "tiny of the index"
        protocols = {one.protocol for one in sandbox.egress_log().entries if one.verdict == "allowed"}
        assert {"connect", "tcp"} <= protocols


@pytest.mark.any_engine
def test_pip_authenticates_with_a_secret(networked: Networked, index: bytes) -> None:
    """A token that the sandbox never has opens a private index: put into Basic credentials, trusted without options."""
    secrets = {"INDEX_TOKEN": Secret("tok-4711", hosts=["api.example.com"])}
    with networked.sandbox(None, secrets) as sandbox:
        shown = install(sandbox, index, "-i https://me:$INDEX_TOKEN@api.example.com/simple")
        assert shown == "tiny of the index", shown
    seen = [dict(one["headers"]) for one in networked.world.requests()]
    assert "Basic bWU6dG9rLTQ3MTE=" in [headers.get("authorization") for headers in seen]


@pytest.mark.any_engine
def test_forks_and_merges_bring_the_network_along(networked: Networked) -> None:
    """Forks reach the same, each with a log of its own; a merge brings what the winner may reach and tried."""
    with networked.sandbox(["api.example.com"]) as parent:
        run(parent, "found['evil'] = fetch('http://evil.example/before')")
        first, second = parent.fork(2)
        with first, second:
            for one in (parent, first, second):
                assert run(one, HELLO)["hello"].startswith("200")
            run(first, "found['evil'] = fetch('http://deep.sub.example.org/')")
            hosts = {one.host for one in second.egress_log().entries}
            assert "api.example.com" in hosts and not hosts & {"evil.example", "deep.sub.example.org"}
            parent.merge_into(first)
            assert run(parent, HELLO)["hello"].startswith("200")
            refused = [one.host for one in parent.egress_log().entries if one.verdict == "refused" and one.host]
            assert refused == ["evil.example", "deep.sub.example.org"]
            (grandchild,) = parent.fork()
            with grandchild:
                assert run(grandchild, HELLO)["hello"].startswith("200")
            with networked.sandbox(None) as plain:
                assert plain.info().egress is False
                plain.merge_into(second)
                assert plain.info().egress == ("api.example.com",)
                assert run(plain, HELLO)["hello"].startswith("200")


def test_a_state_of_many_generations_keeps_its_network(networked: Networked) -> None:
    """Where forks are so deep that memory is carried instead of forked, the first one's network is there, too."""
    with networked.sandbox(["api.example.com"]) as sandbox:
        for _ in range(27):
            (child,) = sandbox.fork()
            sandbox.merge_into(child)
        assert sandbox.info().generation == 27
        assert run(sandbox, HELLO)["hello"].startswith("200")


def test_a_killed_gate_is_replaced(networked: Networked, data_dir: Path) -> None:
    """After SIGKILL of the gate sandboxes get their network back, their logs go on, secrets still hold."""
    secrets = {"TOKEN": Secret("tok-4711", hosts=["api.example.com"])}
    with serving(networked.world, data_dir) as networked, networked.sandbox(["other.example.com"], secrets) as sandbox:
        ask = """
found["secret"] = fetch("https://api.example.com/s", {"X-Token": os.environ["TOKEN"]})[:3]
found["name"] = fetch("http://other.example.com/", direct=True)[:3]
"""
        assert run(sandbox, ask) == {"secret": "200", "name": "200"}
        gate = gate_of(networked.daemon.pid)
        before = [(one.protocol, one.host, one.verdict) for one in sandbox.egress_log().entries]
        os.kill(gate, signal.SIGKILL)
        told = [(one.protocol, one.host, one.verdict) for one in sandbox.egress_log().entries]
        assert told[: len(before)] == before and told[len(before)][0] == "gate" and len(before) > 1
        deadline = time.monotonic() + WAIT_S
        while run(sandbox, ask) != {"secret": "200", "name": "200"}:
            assert time.monotonic() < deadline
        assert gate_of(networked.daemon.pid) not in (0, gate)
        tokens = {dict(one["headers"]).get("x-token") for one in networked.world.requests() if one["target"] == "/s"}
        assert tokens == {"tok-4711"}
        with networked.sandbox(["api.example.com"]) as later:
            assert run(later, HELLO)["hello"].startswith("200")


def test_the_gate_runs_without_privileges(networked: Networked) -> None:
    """The process that carries all traffic has no capability and can get none; as root it has another user id."""
    status = Path(f"/proc/{gate_of(networked.daemon.pid)}/status").read_text()
    rows = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert rows["NoNewPrivs"] == "1"
    assert all(int(rows[name], 16) == 0 for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")), rows
    assert "0" not in rows["Uid"].split()


@pytest.mark.any_engine
def test_closing_a_sandbox_ends_its_connections(networked: Networked) -> None:
    """What a sandbox had open ends with it, seen from the other side."""
    with networked.sandbox(True) as sandbox:
        sandbox.run_code(f"s = socket.create_connection(('{worlds.WEB}', 7001)); s.sendall(b'x')")
        assert any(one.port == 7001 and one.verdict == "allowed" for one in sandbox.egress_log().entries)
        assert _gates_sockets(networked) > 0
    deadline = time.monotonic() + WAIT_S
    while _gates_sockets(networked):
        assert time.monotonic() < deadline
        time.sleep(0.02)  # the gate closes them in its own time


def _gates_sockets(networked: Networked) -> int:
    """Connections of the gate to port 7001."""
    rows = Path(f"/proc/{networked.daemon.pid}/net/tcp").read_text().splitlines()[1:]
    return sum(row.split()[2].endswith(f":{7001:04X}") and row.split()[3] == "01" for row in rows)
