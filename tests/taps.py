"""The other end of a virtual machine's tap, opened as Firecracker does it, for a test that plays the machine."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys

from podflare.engines.microvm import tap
from podflare.engines.microvm.tap import Entrance

HEADER = bytes(12)
"""struct virtio_net_hdr_v1: nothing is left to do in the frame behind it."""
_OPEN = """
import fcntl, os, socket, struct, sys
name, line = sys.argv[1].encode(), socket.socket(fileno=int(sys.argv[2]))
fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name, 0x0002 | 0x1000 | 0x4000))  # TUNSETIFF
fcntl.ioctl(fd, 0x400454D0, 7)  # TUNSETOFFLOAD
fcntl.ioctl(fd, 0x400454D8, struct.pack("i", 12))  # TUNSETVNETHDRSZ
address = fcntl.ioctl(socket.socket(), 0x8927, struct.pack("16s24x", name))[18:24]  # SIOCGIFHWADDR
socket.send_fds(line, [address], [fd])
"""
_OPEN_S = 20


class TapEnd:
    """Sends and receives a machine's frames, as its socket would in the place of a tap."""

    def __init__(self, entrance: Entrance) -> None:
        line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with line, theirs:
            words = [sys.executable, "-I", "-S", "-c", _OPEN, tap.NAME, str(theirs.fileno())]
            subprocess.run(entrance.wrap(words), pass_fds=[theirs.fileno()], check=True, timeout=_OPEN_S)
            self.station, [self._fd], _, _ = socket.recv_fds(line, 16, 1)
        """Address of the tap itself, to which nobody has to send."""
        self._timeout: float | None = None

    def fileno(self) -> int:
        return self._fd

    def settimeout(self, seconds: float | None) -> None:
        self._timeout = seconds

    def setblocking(self, flag: bool) -> None:
        self._timeout = None if flag else 0.0

    def send(self, frame: bytes | bytearray, header: bytes = HEADER) -> None:
        """What is none at all the kernel refuses, and Firecracker forgets."""
        try:
            os.write(self._fd, header + frame)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                raise

    def recv(self, size: int) -> bytes:
        if not select.select([self._fd], [], [], self._timeout)[0]:
            raise TimeoutError
        return os.read(self._fd, size + len(HEADER))[len(HEADER) :]

    def close(self) -> None:
        os.close(self._fd)
