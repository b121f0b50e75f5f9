"""Promise: a vsock port of a virtual machine speaks with the newest connection of the hypervisor, and with nobody else.

Over TCP, for vsock needs a hypervisor below; only the kind of socket and the host's address differ.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator

import pytest

from podflare.guest.vm import ports

HOST, STRANGER = "127.0.0.1", "127.0.0.2"
Connect = Callable[..., socket.socket]


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ports.VsockPort, Connect]]:
    """The port, and connect(source) -> a connection to it."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.setblocking(False)
        made = ports.VsockPort.__new__(ports.VsockPort)
        made._listener, made._peer = listener, None
        monkeypatch.setattr(socket, "VMADDR_CID_HOST", HOST)
        monkeypatch.setattr(ports, "PEER_TIMEOUT_S", 0.1)

        def connect(source: str = HOST) -> socket.socket:
            sock = socket.create_connection(listener.getsockname(), 10, (source, 0))
            return stack.enter_context(sock)

        yield made, connect
        made._drop()


def heard(port: ports.VsockPort) -> bytes:
    """The next bytes that come."""
    while (data := port.receive()) is None:
        ports._wait(port._peer or port._listener, ports.select.POLLIN, 10)
    return data


def test_the_newest_connection_counts(port: tuple[ports.VsockPort, Connect]) -> None:
    """A new connection takes the place of the old, whose bytes are gone; orders and answers go over it alone."""
    vsock, connect = port
    assert vsock.receive() == b"" and vsock.send(memoryview(b"x")) == 0
    first = connect()
    assert vsock.peer() >= 0 and vsock.peers == 1
    first.sendall(b"old")
    assert heard(vsock) == b"old"
    second = connect()
    first.sendall(b"lost")
    second.sendall(b"new")
    assert heard(vsock) == b"new" and vsock.peers == 2
    assert vsock.send(memoryview(b"answer")) == 6 and second.recv(10) == b"answer"
    with contextlib.suppress(ConnectionResetError):
        assert first.recv(10) == b""


def test_an_ended_connection_is_not_handed_out(port: tuple[ports.VsockPort, Connect]) -> None:
    """After its peer is gone the port waits for another one, says so if nobody comes, and takes who comes later."""
    vsock, connect = port
    connect().close()
    assert heard(vsock) == b"" and len(vsock.descriptors()) == 1
    with pytest.raises(OSError, match="nobody has connected"):
        vsock.peer()
    late = connect()
    assert vsock.peer() in vsock.descriptors()
    late.sendall(b"here")
    assert heard(vsock) == b"here"


def test_strangers_are_refused(port: tuple[ports.VsockPort, Connect]) -> None:
    """A connection from elsewhere than the hypervisor, as user code inside could make one, never becomes the peer."""
    vsock, connect = port
    real = connect()
    vsock.peer()
    stranger = connect(STRANGER)
    stranger.sendall(b"orders")
    real.sendall(b"mine")
    assert heard(vsock) == b"mine" and vsock.peers == 1
    with contextlib.suppress(ConnectionResetError):
        assert stranger.recv(10) == b""
