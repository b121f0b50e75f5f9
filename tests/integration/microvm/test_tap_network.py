"""Promise: what is on a tap, as Firecracker's machines are, has the network that it was given, as any other machine.

Real guests, on a QEMU that is started as Firecracker is and opens the same tap (tests/tapping.py).  All tests of
networks run so with `--vmm tap`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import tapping
import vms
import worlds
from networks import Networked, run, serving
from podflare import Secret, close_default_client
from podflare.engines.microvm.image.store import Image

pytestmark = [*vms.MARKS, pytest.mark.microvm]

VALUE = "sk-on-a-tap"
TRY = f"""
found["allowed"] = fetch("http://api.example.com/hello")[:3]
found["direct"] = fetch("http://api.example.com/hello", direct=True)[:3]
found["evil"] = fetch("http://evil.example/")
found["lookup"] = attempt(lambda: socket.gethostbyname("evil.example"))
found["raw"] = connect({worlds.WEB!r}, 80)
found["metadata"] = connect({worlds.METADATA!r}, 80)
def datagram():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(20); s.connect(({worlds.WEB!r}, 123)); s.send(b"x"); s.recv(1)
found["datagram"] = attempt(datagram)
found["interfaces"] = sorted(os.listdir("/sys/class/net"))
"""
SPEND = """
found["tls"] = fetch("https://api.example.com/spend", {"X-Token": os.environ["TOKEN"]})[:3]
found["token"] = os.environ["TOKEN"]
"""
BULK = f"""
def there(size):
    with socket.create_connection(({worlds.WEB!r}, 7006), timeout=60) as s:
        s.sendall(bytes(size)); s.shutdown(socket.SHUT_WR); return s.recv(100).decode().strip()
def back(size):
    with socket.create_connection(({worlds.WEB!r}, 7003), timeout=60) as s:
        s.sendall(f"{{size}}\\n".encode()); came = 0
        while data := s.recv(1 << 20): came += len(data)
        return str(came)
found["there"], found["back"] = there(10_000_000), back(10_000_000)
"""
HOLD = f"held = socket.create_connection(({worlds.WEB!r}, 7000), timeout=60)"
HELD = 'found["held"] = attempt(lambda: str(held.send(b"x")) + str(held.recv(1)))'


@pytest.fixture(scope="module")
def tapped(image: Image, private_temp: Path) -> Iterator[Networked]:
    """A daemon whose virtual machines are on taps."""
    vms.skip_without(*vms.PROGRAMS)
    folder = Path(tempfile.mkdtemp(prefix="w", dir=private_temp))
    folder.chmod(0o711)
    with worlds.world(folder) as world:
        with serving(world, folder, image.directory.parent.parent, tapping.PROGRAM) as networked:
            vms.boot_over_http(networked.daemon.url, egress=True)
            close_default_client()
            yield networked


def test_names_secrets_refusals_and_forks(tapped: Networked) -> None:
    """What is allowed is reached, by the proxy and without, a secret goes to its host, everything else is refused at
    once and in the log; a fork has the same and a wire of its own, where its parent's connections are reset."""
    reach = ["api.example.com", f"{worlds.WEB}:7000"]
    with tapped.sandbox(reach, {"TOKEN": Secret(VALUE, hosts=["api.example.com"])}) as parent:
        assert "network_namespace" in parent.info().isolation
        run(parent, HOLD)
        [child] = parent.fork()
        with child:
            found = run(parent, f"{SPEND}\n{TRY}\n{HELD}")
            assert [found[what] for what in ("allowed", "direct", "tls")] == ["200"] * 3, found
            assert found["evil"].startswith("403 egress to evil.example is not allowed")
            assert "gaierror" in found["lookup"] and "Connection refused" in found["raw"]
            for what in ("metadata", "datagram"):
                assert "Error" in found[what] and not found[what].startswith("slow"), found
            assert (found["interfaces"], found["held"]) == (["eth0", "lo"], "1b'x'")
            refused = {one.host or one.address for one in parent.egress_log().entries if one.verdict == "refused"}
            assert refused >= {"evil.example", worlds.METADATA, worlds.WEB}
            forked = run(child, f"{SPEND}\n{HELD}")
            assert (forked["tls"], forked["token"]) == ("200", found["token"])
            assert forked["token"].startswith("podflare-secret-")
            assert forked["held"].startswith(("ConnectionResetError", "BrokenPipeError"))
        spent = [dict(one["headers"])["x-token"] for one in tapped.world.requests() if one["target"] == "/spend"]
        assert spent == [VALUE] * 2


def test_much_at_a_time(tapped: Networked) -> None:
    """Megabytes go there and come back whole, through buffers in which frames are lost that come too fast."""
    with tapped.sandbox(True) as sandbox:
        assert run(sandbox, BULK) == {"there": "10000000", "back": "10000000"}
        assert os.geteuid() != 0 or "separate_uid" in sandbox.info().isolation
