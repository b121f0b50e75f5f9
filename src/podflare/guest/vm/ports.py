"""The two byte channels out of a virtual machine: named virtio-serial ports (QEMU), or vsock ports (Firecracker).

Either is a `Port`: a non-blocking descriptor that may be without a peer for a while, and get another one.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from typing import Optional, Tuple

CHANNEL, CONTROL = "podflare.channel", "podflare.control"
VSOCK_NUMBERS = {CHANNEL: 7000, CONTROL: 7001}
READ_BYTES = 256 * 1024
PEER_TIMEOUT_S = 60.0

_PORTS = "/sys/class/virtio-ports"


class Port:
    """Bytes from and to whoever is at the other end."""

    peers = 0
    """How many peers there were; another one may have the same descriptor number."""

    def descriptors(self) -> Tuple[int, ...]:
        """What to watch now, edge-triggered."""
        raise NotImplementedError

    def peer(self) -> int:
        """The descriptor of who is at the other end, waiting for somebody.  Raises: OSError if nobody comes."""
        raise NotImplementedError

    def receive(self) -> Optional[bytes]:
        """What has come, b"" where nobody is there, None if nothing has come yet."""
        raise NotImplementedError

    def send(self, data: memoryview) -> int:
        """How many bytes were taken; 0 if none can be taken now."""
        raise NotImplementedError


class SerialPort(Port):
    """A virtio-serial port.  Without a peer, reading finds the end of the stream and epoll reports a hang-up for
    as long as it lasts, which is why ports are watched edge-triggered."""

    def __init__(self, device: str) -> None:
        self._fd = os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def descriptors(self) -> Tuple[int, ...]:
        return (self._fd,)

    def peer(self) -> int:
        return self._fd

    def receive(self) -> Optional[bytes]:
        try:
            return os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return None

    def send(self, data: memoryview) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return 0


class VsockPort(Port):
    """A vsock port that the host connects to, anew after each restore (which breaks every connection)."""

    def __init__(self, number: int) -> None:
        self._listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._listener.bind((socket.VMADDR_CID_ANY, number))
        self._listener.listen(4)
        self._peer: Optional[socket.socket] = None

    def descriptors(self) -> Tuple[int, ...]:
        found = (self._listener.fileno(),)
        return found if self._peer is None else (*found, self._peer.fileno())

    def peer(self) -> int:
        self._accept()
        if self._peer is not None and _wait(self._peer, select.POLLHUP | select.POLLERR, 0):
            self._drop()  # of before a restore; the new one may come a moment later
        if self._peer is None:
            _wait(self._listener, select.POLLIN, PEER_TIMEOUT_S)
            self._accept()
        if self._peer is None:
            raise OSError(errno.ETIMEDOUT, "nobody has connected")
        return self._peer.fileno()

    def receive(self) -> Optional[bytes]:
        self._accept()
        if self._peer is None:
            return b""
        try:
            data = self._peer.recv(READ_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not data:
            self._drop()
        return data

    def send(self, data: memoryview) -> int:
        self._accept()
        if self._peer is None:
            return 0
        try:
            return self._peer.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self._drop()
            return 0

    def _accept(self) -> None:
        """The newest connection counts: an older one is a relic of before a restore."""
        while True:
            try:
                peer, address = self._listener.accept()
            except OSError:
                return
            if address[0] != socket.VMADDR_CID_HOST:
                peer.close()  # user code, which can open vsock sockets, too
                continue
            peer.setblocking(False)
            self._drop()
            self._peer = peer
            self.peers += 1

    def _drop(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None


def _wait(sock: socket.socket, events: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(sock, events)
    return bool(poll.poll(int(timeout_s * 1000)))


def find(name: str) -> Port:
    """The port called `name`.  Raises: OSError if the machine has neither kind of device."""
    device = _serial_device(name)
    return SerialPort(device) if device else VsockPort(VSOCK_NUMBERS[name])


def _serial_device(name: str) -> str:
    try:
        entries = sorted(os.listdir(_PORTS))
    except OSError:
        return ""
    for entry in entries:
        try:
            with open(f"{_PORTS}/{entry}/name") as file:
                if file.read().strip() == name:
                    return f"/dev/{entry}"
        except OSError:
            continue  # a port without a name
    return ""
