"""A wire to a virtual machine whose hypervisor knows no other than a tap: `python -I -S ... tap FD NAME OWNER`.

Started in a new network namespace, in which there is nothing else, makes the tap NAME that the user OWNER may open
once, and a packet socket on it, through which its frames come out and go in; sends that and the namespaces to the
socket FD and ends.  No address is on the tap, so the kernel in between answers to nothing.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from typing import NoReturn

from podflare.guest import uplink

_BUFFER_BYTES = 4 << 20
"""Of frames that the gate has not read yet."""
# linux/if_tun.h, linux/if_ether.h, asm/socket.h
_TUNSETPERSIST, _TUNSETOWNER = 0x400454CB, 0x400454CC
_IFF_TAP, _IFF_VNET_HDR = 0x0002, 0x4000
_ETH_P_IP = 0x0800
_SO_RCVBUFFORCE = 33


def main(fd: int, name: str, owner: int) -> NoReturn:
    """Raises: OSError with what could not be made; SystemExit."""
    with socket.socket(fileno=fd) as control:
        _make(name, owner)
        with _frames_of(name) as frames:
            spaces = [os.open(f"/proc/self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in ("net", "user")]
            socket.send_fds(control, [b"."], [frames.fileno(), *spaces])
    raise SystemExit(0)


def _make(name: str, owner: int) -> None:
    """It stays when it is closed, until its namespace goes: one process at a time may have it open."""
    fd = os.open(uplink.DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        flags = struct.pack("H", _IFF_TAP | uplink.IFF_NO_PI | _IFF_VNET_HDR)
        fcntl.ioctl(fd, uplink.TUNSETIFF, uplink.request(name, flags))
        fcntl.ioctl(fd, _TUNSETOWNER, owner)
        fcntl.ioctl(fd, _TUNSETPERSIST, 1)
    finally:
        os.close(fd)
    uplink.without_ipv6(name)
    uplink.shorten_queue(name)
    uplink.switch_on(name)


def _frames_of(name: str) -> socket.socket:
    """IPv4 alone, of what the machine sends; whatever is written is sent to it."""
    # Of no protocol until it is bound: before that it would hear every interface.
    frames = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
    try:
        try:
            frames.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        except PermissionError:  # in a user namespace as much as everybody may
            frames.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        frames.bind((name, _ETH_P_IP))
    except BaseException:
        frames.close()
        raise
    return frames
