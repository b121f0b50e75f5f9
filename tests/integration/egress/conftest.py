"""A gate in the middle of a small internet, and machines' networks attached to it, without daemon and sandboxes."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal

import worlds
from podflare.egress.keeper import Attached, GateKeeper, GateSettings
from podflare.egress.policy import Policy, SecretSpec, parse_private
from podflare.wire.egress import EgressEntry

ALLOWED_PRIVATE = "10.77.0.0/16"

PRELUDE = '''
import json, os, socket, ssl, threading, time, urllib.error, urllib.request

GATEWAY = "198.18.0.1"
PROXY = (GATEWAY, 3128)

def attempt(call, *args):
    """What a call gives, or how it fails, in words; and whether that took less than two seconds."""
    start = time.monotonic()
    try:
        outcome = call(*args)
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    return [outcome, time.monotonic() - start < 2]

def connect(host, port):
    with socket.create_connection((host, port), timeout=8) as sock:
        return "connected to " + sock.getpeername()[0]

def talk(address, data, timeout=8, until=None):
    """Everything that comes back for `data`."""
    with socket.create_connection(address, timeout=timeout) as sock:
        sock.sendall(data)
        got = b""
        while until is None or until not in got:
            part = sock.recv(65536)
            if not part:
                break
            got += part
        return got.decode("latin-1")

def fetch(url, headers={}, data=None, method=None, timeout=15):
    """Status and body, an error's included."""
    request = urllib.request.Request(url, data=data, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=timeout, context=trust()) as answer:
            return [answer.status, answer.read().decode("latin-1")]
    except urllib.error.HTTPError as error:
        with error:
            return [error.code, error.read().decode("latin-1")]

def trust():
    return ssl.create_default_context(cafile=CA)

def use_proxy():
    os.environ["http_proxy"] = os.environ["https_proxy"] = "http://198.18.0.1:3128"

def tell(value):
    print(json.dumps(value))
'''


class Network:
    """One machine's network."""

    def __init__(self, portal: BlockingPortal, keeper: GateKeeper, key: str, attached: Attached, inside: worlds.Inside):
        self._portal = portal
        self._keeper = keeper
        self.key = key
        self.attached = attached
        self.inside = inside
        self.trusted = inside.ca_file

    def run(self, code: str, **values: Any) -> Any:
        """What `code`, run in the machine's network after PRELUDE, gives to `tell`; `values` are its variables."""
        given = "".join(f"{name} = {value!r}\n" for name, value in {"CA": str(self.trusted), **values}.items())
        output = self.inside.run(PRELUDE + given + code)
        assert "Traceback" not in output, output
        return json.loads(output)

    def journal(self) -> list[EgressEntry]:
        return list(self._portal.call(self._keeper.journal, self.key)[0])

    def fork(self) -> Network:
        """The network of a fork."""
        inside = worlds.Inside(Path(tempfile.gettempdir()), ca_pem=self.trusted.read_bytes())
        key = f"{self.key}-fork"
        self._portal.call(self._keeper.branch, key, self.key, inside.tun, inside.listener)
        return Network(self._portal, self._keeper, key, self.attached, inside)

    def close(self) -> None:
        self._portal.call(self._keeper.detach, self.key)
        self.inside.close()


@pytest.fixture(scope="session")
def world(private_temp: Path) -> Iterator[worlds.World]:
    """A small internet."""
    with tempfile.TemporaryDirectory(dir=private_temp, prefix="w") as folder:
        Path(folder).chmod(0o755)
        with worlds.world(Path(folder)) as running:
            yield running


@pytest.fixture
def settings(world: worlds.World) -> GateSettings:
    """Of a gate in the middle of the world."""
    return _settings(world)


def _settings(world: worlds.World) -> GateSettings:
    command = (*world.enter, sys.executable, "-m", "podflare.egress.gate")
    return GateSettings(private=parse_private(ALLOWED_PRIVATE), ca_file=world.ca_file, command=command)


@pytest.fixture(scope="session")
def keeper(world: worlds.World, portal: BlockingPortal) -> Iterator[GateKeeper]:
    """A keeper with a running gate, for many tests."""
    made = portal.call(_keeper, world)
    _attach(portal, made, world, "first", Policy.parse(True), {}).close()
    yield made
    portal.call(made.aclose)


@pytest.fixture
def own_keeper(world: worlds.World, portal: BlockingPortal) -> Iterator[GateKeeper]:
    """A keeper whose gate a test may kill."""
    made = portal.call(_keeper, world)
    yield made
    portal.call(made.aclose)


@pytest.fixture
def network(portal: BlockingPortal, keeper: GateKeeper, world: worlds.World) -> Iterator[Callable[..., Network]]:
    """Makes machines' networks; all are detached at the end of the test."""
    yield from _networks(portal, keeper, world)


@pytest.fixture
def own_network(
    portal: BlockingPortal, own_keeper: GateKeeper, world: worlds.World
) -> Iterator[Callable[..., Network]]:
    """As `network`, at the keeper of this test."""
    yield from _networks(portal, own_keeper, world)


def _networks(portal: BlockingPortal, keeper: GateKeeper, world: worlds.World) -> Iterator[Callable[..., Network]]:
    made: list[Network] = []

    def make(egress: bool | Sequence[str], secrets: Mapping[str, SecretSpec] | None = None) -> Network:
        policy = Policy.parse(egress, private=parse_private(ALLOWED_PRIVATE))
        made.append(_attach(portal, keeper, world, f"net_{len(made)}", policy, secrets or {}))
        return made[-1]

    world.queries()
    world.requests()
    yield make
    for one in made:
        one.close()


async def _keeper(world: worlds.World) -> GateKeeper:
    return GateKeeper(_settings(world))


def _attach(
    portal: BlockingPortal,
    keeper: GateKeeper,
    world: worlds.World,
    key: str,
    policy: Policy,
    secrets: Mapping[str, SecretSpec],
) -> Network:
    attached = portal.call(keeper.prepare, key, policy, secrets)
    # The servers of the world are signed by its own authority, which nobody trusts by itself.
    ca_pem = world.ca_file.read_bytes() + (attached.ca_pem or b"")
    inside = worlds.Inside(Path(tempfile.gettempdir()), ca_pem=ca_pem)
    portal.call(keeper.attach, key, inside.tun, inside.listener)
    return Network(portal, keeper, key, attached, inside)
