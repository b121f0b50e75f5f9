"""Asks the kernel whether an address is one of this machine's own, by rtnetlink."""

from __future__ import annotations

import os
import socket
import struct

from podflare.egress.addresses import Address

_HEADER = struct.Struct("=IHHII")
_ROUTE = struct.Struct("=BBBBBBBBI")
_ATTRIBUTE = struct.Struct("=HH")
_GET_ROUTE, _NEW_ROUTE, _ERROR, _REQUEST, _DESTINATION = 26, 24, 2, 1, 1
_UNREACHABLE_KINDS = (0, 1, 6, 7, 8)
"""Route types that are nobody's here: none, unicast, blackhole, unreachable, prohibit."""
_TIMEOUT_S = 2.0


class Routes:
    """A socket to the kernel's routing tables."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.settimeout(_TIMEOUT_S)  # the kernel answers within the call
        self._number = 0

    def is_own(self, address: Address) -> bool:
        """Whether packets to `address` would be delivered on this machine (or broadcast).

        Raises: OSError if the kernel does not say.
        """
        self._number += 1
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        packed = address.packed
        route = _ROUTE.pack(family, len(packed) * 8, 0, 0, 0, 0, 0, 0, 0)
        attribute = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(packed), _DESTINATION) + packed
        length = _HEADER.size + len(route) + len(attribute)
        self._socket.send(_HEADER.pack(length, _GET_ROUTE, _REQUEST, self._number, 0) + route + attribute)
        while True:
            answer = self._socket.recv(65536)
            _, kind, _, number, _ = _HEADER.unpack_from(answer)
            if number != self._number:
                continue  # an answer that came too late for an earlier question
            if kind == _ERROR:
                return False  # no route at all: dialling fails by itself
            if kind != _NEW_ROUTE:
                raise OSError(f"{os.strerror(71)}: the kernel's routes")
            return _ROUTE.unpack_from(answer, _HEADER.size)[7] not in _UNREACHABLE_KINDS

    def close(self) -> None:
        self._socket.close()
