"""Promise: a sandbox has no network but its own loopback."""

from __future__ import annotations

import socket

import pytest


@pytest.mark.both_engines
def test_nothing_of_the_host_can_be_reached(attacker):
    """The host's loopback listener, its addresses, the metadata address and public ones fail at once."""
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        out = attacker.run(f"""
import socket, time
start = time.monotonic()
for address in ("127.0.0.1", "0.0.0.0", "10.0.0.1", "172.17.0.1", "192.168.0.1", "169.254.169.254", "192.0.2.1", "::1", "fe80::1"):
    try:
        socket.create_connection((address, {port}), timeout=5).close()
        print("REACHED", address)
    except OSError: pass
print(time.monotonic() - start < 3)
""")
    assert out.stdout == "True\n", out.stdout


@pytest.mark.any_engine
def test_abstract_unix_sockets_of_the_host_are_out_of_reach(attacker):
    """An abstract socket, which has no file, is visible in its own network namespace only."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0podflare-test-4711")
        server.listen()
        out = attacker.run("""
import socket
s = socket.socket(socket.AF_UNIX)
try:
    s.connect("\\0podflare-test-4711"); print("REACHED")
except OSError as e: print(e.strerror)
""")
    assert out.stdout == "Connection refused\n"


def test_special_socket_families_are_refused(attacker):
    """Netlink, packet, raw, vsock, alg, bluetooth and the like cannot be opened."""
    out = attacker.run("""
import socket
for family in range(0, 60):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET, 10):
        try:
            socket.socket(family, kind, 0).close()
            print(family, kind)
        except OSError: pass
for family, protocol in ((socket.AF_INET, 1), (socket.AF_INET, 255), (socket.AF_INET6, 58)):
    try:
        socket.socket(family, socket.SOCK_RAW, protocol).close(); print("RAW", family)
    except OSError: pass
""")
    pairs = {tuple(map(int, line.split())) for line in out.stdout.splitlines()}
    assert pairs <= {(1, 1), (1, 2), (1, 5), (2, 1), (2, 2), (10, 1), (10, 2)}, out.stdout
    assert {(1, 1), (2, 1), (10, 1)} <= pairs


@pytest.mark.both_engines
def test_loopback_works_and_is_private(attacker, new_machine):
    """Two sandboxes can both listen on one port; each reaches only itself."""
    other = new_machine()
    serve = """
import socket, threading
s = socket.create_server(("127.0.0.1", 80))
threading.Thread(target=lambda: [c.send({name!r}) or c.close() for c in iter(lambda: s.accept()[0], None)], daemon=True).start()
"""
    for machine, name in ((attacker, b"one"), (other, b"two")):
        assert machine.run(serve.format(name=name)).exit.code == 0
    ask = "print(socket.create_connection(('127.0.0.1', 80)).recv(9))"
    assert attacker.run(ask).stdout == "b'one'\n"
    assert other.run(ask).stdout == "b'two'\n"


@pytest.mark.any_engine
def test_name_lookup_fails_at_once(attacker):
    """Looking up a name ends with an error within seconds, not with a hang."""
    out = attacker.run(
        "import socket\ntry: socket.gethostbyname('example.com')\nexcept OSError as e: print('no')", timeout_s=20
    )
    assert out.stdout == "no\n"
