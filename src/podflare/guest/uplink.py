"""A way out as its inside sees it: the interface, its address and route, the listener, what programs are told.

Steps only; which of them a machine takes is decided by who makes it.  All but `tell_programs` need CAP_NET_ADMIN, and
raise OSError.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import struct
from typing import Dict, List

from podflare.wire import uplink as link

_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
"""Where distributions keep the certificates that they trust."""
DEVICE = "/dev/net/tun"
"""Of a computer; a machine of the process engine may have it elsewhere."""

# linux/if_tun.h, linux/sockios.h, net/if.h
TUNSETIFF = 0x400454CA
_IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
_SIOCADDRT, _SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFDSTADDR, _SIOCSIFMTU = 0x890B, 0x8914, 0x8916, 0x8918, 0x8922
_SIOCETHTOOL, _ETHTOOL_STXCSUM = 0x8946, 0x17
_IFF_UP, _IFF_RUNNING, _IFF_NOARP = 0x1, 0x40, 0x80
_RTF_UP, _RTF_GATEWAY = 0x1, 0x2
# linux/rtnetlink.h, linux/if_link.h, linux/netlink.h
_RTM_NEWLINK, _IFLA_TXQLEN, _NLMSG_ERROR = 16, 13, 2
_NLM_F_REQUEST, _NLM_F_ACK = 1, 4
_QUEUED_PACKETS = 64
"""Which nobody has read yet, the rest is dropped: at the usual 500 a machine that floods would hold 32 MiB."""


def open_tun(device: str) -> int:
    """A new interface in the network namespace of this process: the descriptor that its packets come out of."""
    fd = os.open(device, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.ioctl(fd, TUNSETIFF, request(link.INTERFACE, struct.pack("H", _IFF_TUN | IFF_NO_PI)))
        shorten_queue(link.INTERFACE)
    except BaseException:
        os.close(fd)
        raise
    return fd


def bring_up() -> None:
    """Give the interface its address, and send everything through it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        fcntl.ioctl(sock, _SIOCSIFADDR, request(link.INTERFACE, _address(link.MACHINE_ADDRESS)))
        fcntl.ioctl(sock, _SIOCSIFDSTADDR, request(link.INTERFACE, _address(link.GATE_ADDRESS)))
        switch_on(link.INTERFACE)
        fcntl.ioctl(sock, _SIOCADDRT, _default_route())


def switch_on(interface: str) -> None:
    """Frames and packets pass from now on.  There is no ARP: each such wire has two ends."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        fcntl.ioctl(sock, _SIOCSIFMTU, request(interface, struct.pack("i", link.MTU)))
        fcntl.ioctl(sock, _SIOCSIFFLAGS, request(interface, struct.pack("H", _IFF_UP | _IFF_RUNNING | _IFF_NOARP)))


def without_ipv6(interface: str) -> None:
    """Neither addresses nor answers of that kind on it."""
    path = f"/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"
    if os.path.exists(path):
        with open(path, "w") as file:
            file.write("1")


def without_offload(interface: str) -> None:
    """What is sent is whole: no checksum is left to a device, nor the cutting of a long segment."""
    value = array.array("I", [_ETHTOOL_STXCSUM, 0])  # struct ethtool_value
    place, _ = value.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            fcntl.ioctl(sock, _SIOCETHTOOL, request(interface, struct.pack("P", place)))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # a device that could not do it anyway
                raise


def take_down() -> None:
    """Whoever connects then fails at once: there is no route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        fcntl.ioctl(sock, _SIOCSIFFLAGS, request(link.INTERFACE, struct.pack("H", 0)))


def listen() -> int:
    """Where connections of the machine's programs are accepted, by whoever has this descriptor."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setblocking(False)
        listener.bind((link.MACHINE_ADDRESS, 0))
        listener.listen(link.LISTEN_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener.detach()


def shorten_queue(interface: str) -> None:
    """What nobody has read yet of what is sent on it is the kernel's memory, and counts for no limit of a machine."""
    # By netlink: the ioctl asks for privileges outside of the user namespace.
    link_info = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, socket.if_nametoindex(interface), 0, 0)
    body = link_info + struct.pack("=HHI", 8, _IFLA_TXQLEN, _QUEUED_PACKETS)
    head = struct.pack("=IHHII", 16 + len(body), _RTM_NEWLINK, _NLM_F_REQUEST | _NLM_F_ACK, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as sock:
        sock.sendto(head + body, (0, 0))
        answer = sock.recv(4096)
    _, kind, _, _, _, error = struct.unpack_from("=IHHIIi", answer)
    if kind != _NLMSG_ERROR or error:
        raise OSError(-error, f"length of the queue of {interface}: {os.strerror(-error)}")


def tell_programs(uplink: link.Uplink, *, files: bool) -> Dict[str, str]:
    """Name server and certificates, where programs look for them.  Returns the variables that they look at.

    Args: files: False for a fork: it has its parent's, with what was changed in them since.
    """
    if files:
        _write("/etc/resolv.conf", f"nameserver {link.GATE_ADDRESS}\n")
    proxy = f"http://{link.GATE_ADDRESS}:{link.PROXY_PORT}"
    found = dict.fromkeys(link.PROXY_VARIABLES, proxy)
    found.update(dict.fromkeys(link.NO_PROXY_VARIABLES, "localhost,127.0.0.1,::1"))
    if uplink.ca_pem:
        bundle = next((path for path in _BUNDLES if os.path.exists(path)), _BUNDLES[0])
        if files:
            os.makedirs(os.path.dirname(bundle), exist_ok=True)
            _write(bundle, "\n" + uplink.ca_pem, append=True)
        found.update(dict.fromkeys(link.CA_VARIABLES, bundle))
    found.update(uplink.environment)
    return found


def _write(path: str, text: str, *, append: bool = False) -> None:
    # Replaced, not opened: a template's file may be a link that leads nowhere here.
    before: List[bytes] = []
    if append and os.path.exists(path):
        with open(path, "rb") as file:
            before.append(file.read())
    if os.path.lexists(path):
        os.unlink(path)
    with open(path, "wb") as file:
        file.writelines([*before, text.encode()])


def request(interface: str, value: bytes) -> bytes:
    """struct ifreq, netdevice(7)."""
    return struct.pack("16s24s", interface.encode(), value)


def _address(text: str) -> bytes:
    """struct sockaddr_in."""
    return struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(text))


def _default_route() -> bytes:
    """struct rtentry: everything goes to the gate."""
    anywhere = _address("0.0.0.0")
    return struct.pack(
        "L16s16s16sHhLPhPLLH6x",
        0,
        anywhere,
        _address(link.GATE_ADDRESS),
        anywhere,
        _RTF_UP | _RTF_GATEWAY,
        *(0,) * 8,
    )
