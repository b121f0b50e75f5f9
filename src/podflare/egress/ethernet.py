"""Ethernet between a virtual machine's interface and the gate: IPv4 packets out of frames and into them.  Pure.

Two stations, one of them the gate, on a wire of their own: who has sent a frame is told by the wire, so addresses mean
nothing and there is no ARP (the machine's interface is brought up without).  Every byte is a guest's.
"""

from __future__ import annotations

import struct

from podflare.egress.packets import Buffer

HEADER_BYTES = 14
_MACHINE, _GATE = bytes.fromhex("525400000001"), bytes.fromhex("525400000002")
_IPV4 = 0x0800
TO_MACHINE = _MACHINE + _GATE + struct.pack(">H", _IPV4)
"""What stands before each packet for the machine."""

_TYPE = struct.Struct(">H")
_TYPE_AT = 12
_LENGTH_AT = HEADER_BYTES + 2
_LEAST = HEADER_BYTES + 20


def packet_size(frame: Buffer, size: int) -> int:
    """How long the IPv4 packet is that the first `size` bytes carry after their header; 0 if they carry none.

    What follows it is padding, as short frames have.  A packet that says to be longer than its frame is none.
    """
    if size < _LEAST or _TYPE.unpack_from(frame, _TYPE_AT)[0] != _IPV4:
        return 0
    length: int = _TYPE.unpack_from(frame, _LENGTH_AT)[0]
    return length if length <= size - HEADER_BYTES else 0
