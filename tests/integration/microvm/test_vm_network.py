"""Promise: a virtual machine has the network that its sandbox was given, its forks theirs, and restored ones none.

What a network lets through and refuses is attacked for both engines alike (tests/security/test_egress.py).
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from anyio.from_thread import BlockingPortal

import firecrackers
import vms
import worlds
from machines import LIMITS, DrivenMachine
from networks import Networked, gate_of, run, serving
from networks import networked as networked
from podflare import Sandbox, Secret, close_default_client
from podflare.engines.base import EngineOptions, MachineSpec
from podflare.engines.microvm.engine import MicrovmEngine
from podflare.engines.microvm.image.store import Image, ImageStore
from podflare.errors import DaemonUnreachable, SandboxNotFound
from podflare.wire.uplink import GATE_ADDRESS, MACHINE_ADDRESS, Uplink

pytestmark = list(vms.MARKS)

WAIT_S = 60.0
HELLO = "found['hello'] = fetch('http://api.example.com/hello')[:3]"
HOLD = f"""
held = socket.create_connection(({worlds.WEB!r}, 7000), timeout=60)
waiting, ended = socket.create_connection(({worlds.WEB!r}, 7001), timeout=60), []
def wait():
    try: ended.append(repr(waiting.recv(1)))
    except OSError as error: ended.append(type(error).__name__)
waiter = threading.Thread(target=wait, daemon=True); waiter.start()
"""
SPEND = """
found["token"] = os.environ["TOKEN"]
found["spent"] = fetch("https://api.example.com/spend", {"X-Token": os.environ["TOKEN"]})[:3]
"""
ECHO = "held.sendall(b'ping'); found['echo'] = held.recv(4).decode()"
ENDED = """
waiter.join(60); found["waiting"] = ended
found["held"] = attempt(lambda: str(held.send(b"x")) + str(held.recv(1)))
"""
REACH = [f"{worlds.WEB}:7000", f"{worlds.WEB}:7001", "api.example.com"]


@pytest.mark.microvm
def test_forks_and_merges(networked: Networked) -> None:
    """A fork reaches the same with a log of its own, and what its parent had open is reset in it, not in the parent;
    secrets go to their host in both, and are in neither; a merge brings the network along."""
    with networked.sandbox(REACH, {"TOKEN": Secret("tok-4711", hosts=["api.example.com"])}) as parent:
        run(parent, HOLD + ECHO)
        [child] = parent.fork()
        with child:
            found = run(child, ENDED + "\n" + HELLO + "\n" + SPEND)
            assert (found["waiting"], found["hello"]) == (["ConnectionResetError"], "200")
            assert (found["spent"], found["token"][:16]) == ("200", "podflare-secret-")
            assert found["held"].startswith(("ConnectionResetError", "BrokenPipeError"))
            assert run(parent, ECHO + "; found['ended'] = ended") == {"echo": "ping", "ended": []}
            run(child, "found['evil'] = fetch('http://evil.example/')")
            hosts = [{one.host for one in sandbox.egress_log().entries} for sandbox in (parent, child)]
            assert ("evil.example" in hosts[0], "evil.example" in hosts[1]) == (False, True)
            parent.merge_into(child)
            merged = run(parent, HELLO + "\n" + SPEND)
            assert merged == {name: found[name] for name in ("hello", "token", "spent")}
            spent = [dict(one["headers"])["x-token"] for one in networked.world.requests() if one["target"] == "/spend"]
            assert spent == ["tok-4711"] * 2


@pytest.mark.microvm
def test_deaths_of_gate_hypervisor_and_daemon(networked: Networked, data_dir: Path, image: Image) -> None:
    """When the gate is killed, open connections are reset and new ones work; a hypervisor's end is its sandbox's alone;
    when the daemon is killed, nothing goes on."""
    images = image.directory.parent.parent
    with pytest.raises(AssertionError), serving(networked.world, data_dir, images) as own:
        with pytest.raises(DaemonUnreachable), own.sandbox(REACH) as sandbox, own.sandbox(REACH) as ended:
            run(sandbox, HOLD + ECHO)
            gate = gate_of(own.daemon.pid)
            os.kill(gate, signal.SIGKILL)
            assert run(sandbox, ENDED)["waiting"] == ["ConnectionResetError"]
            assert run(sandbox, HELLO)["hello"] == "200"
            assert gate_of(own.daemon.pid) not in (0, gate)
            on_firecracker = vms.vmm == "firecracker"
            vmms = firecrackers.below(own.daemon.pid) if on_firecracker else children_of(own.daemon.pid, b"qemu")
            os.kill(max(vmms), signal.SIGKILL)
            assert "its virtual machine ended" in end_of(ended)
            assert run(sandbox, HELLO)["hello"] == "200"
            watched = [os.pidfd_open(pid) for pid in children_of(own.daemon.pid)]
            os.kill(own.daemon.pid, signal.SIGKILL)
            for pidfd in watched:
                assert select.select([pidfd], [], [], WAIT_S)[0]
                os.close(pidfd)
    with serving(networked.world, data_dir, images) as own:  # which clears what is no process
        assert not Sandbox.list(host=own.daemon.url)
    close_default_client()


def end_of(sandbox: Sandbox) -> str:
    """What is told of a sandbox whose machine dies just now: on stderr of its cell, or instead of it."""
    try:
        return sandbox.run_code("1").stderr
    except SandboxNotFound as exc:
        return str(exc)


def children_of(pid: int, program: bytes = b"") -> list[int]:
    """Its processes whose command line has `program` in it."""
    found = [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]
    return [child for child in found if program in Path(f"/proc/{child}/cmdline").read_bytes()]


LOOK = """
import os, socket, time
print(sorted(os.listdir("/sys/class/net")), open("/proc/net/if_inet6").read().count("eth0"))
print(open("/etc/resolv.conf").read().strip())
print(os.environ["HTTPS_PROXY"], os.environ["TOKEN"], "MIIBnotreally" in open(os.environ["SSL_CERT_FILE"]).read())
print(os.popen("echo $TOKEN").read().strip())
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
"""
CONNECT = """
start = time.monotonic()
try: socket.create_connection(("192.0.2.1", 80), timeout=60)
except OSError as error: print(error.strerror, time.monotonic() - start < 20)
"""
CA = "-----BEGIN CERTIFICATE-----\nMIIBnotreally\n-----END CERTIFICATE-----\n"


@pytest.fixture
def keeping(portal: BlockingPortal, image_store: ImageStore, data_dir: Path) -> Iterator[MicrovmEngine]:
    """An engine that keeps snapshots."""
    options = EngineOptions(data_dir=str(data_dir), instance=data_dir.name)
    made = portal.call(vms.started_engine, replace(options, snapshot_dir=str(data_dir / "kept")), image_store)
    yield made
    portal.call(made.aclose)


@pytest.mark.microvm
def test_what_a_machine_is_told_and_what_is_kept_of_it(portal: BlockingPortal, keeping: MicrovmEngine) -> None:
    """Resolver, proxy, certificate and placeholders are in place, in its forks too, and packets come out as frames; one
    that is restored from a snapshot has no way out, fails at once, and nothing of the old one was kept beside it."""
    spec = MachineSpec("default", LIMITS, uplink=Uplink((("TOKEN", "podflare-secret-00ff"),), CA))
    machine = DrivenMachine(portal, portal.call(lambda: keeping.create(spec, timeout_s=vms.BOOT_TIMEOUT_S)))
    [child] = machine.fork()
    for one in (machine, child):
        assert one.run(LOOK).stdout.splitlines() == [
            "['eth0', 'lo'] 0",
            f"nameserver {GATE_ADDRESS}",
            f"http://{GATE_ADDRESS}:3128 podflare-secret-00ff True",
            "podflare-secret-00ff",
        ]
        ends = one.machine.uplink
        assert ends is not None and ends.frames is not None
        one.run("s.sendto(b'x' * 60000, ('192.0.2.7', 9))")
        assert udp_payload(ends.frames) == b"x" * 60000
    machine.call(lambda: machine.machine.snapshot("mine", timeout_s=60))
    kept = Path(keeping._options.snapshot_dir, "mine", "about.json").read_text()
    assert "podflare-secret" not in kept and "notreally" not in kept
    restored = DrivenMachine(portal, portal.call(lambda: keeping.restore("mine", timeout_s=60)))
    restored._channel = 50
    assert restored.machine.uplink is None
    assert restored.run(CONNECT).stdout == "Network is unreachable True\n"


def udp_payload(frames: int) -> bytes:
    """Of the next datagram in the frames."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline and select.select([frames], [], [], WAIT_S)[0]:
        packet = os.read(frames, 70_000)[14:]
        if packet[0] == 0x45 and packet[9] == 17 and packet[12:16] == bytes(map(int, MACHINE_ADDRESS.split("."))):
            return packet[28:]
    raise AssertionError("no datagram came")
