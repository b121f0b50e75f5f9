"""IPv4 packets of a machine: looked at, rewritten in place, answered with RST or ICMP.  Pure.

Every byte is a guest's.  `parse` is the only way in: what it lets through has the lengths that the rest relies on.
"""

from __future__ import annotations

import struct

TCP, UDP, ICMP = 6, 17, 1
FIN, SYN, RST, ACK = 1, 2, 4, 16
ECHO_REQUEST = 8
PROHIBITED, HOST_UNREACHABLE, PROTOCOL_UNREACHABLE = 13, 1, 2
"""Codes of ICMP's `destination unreachable`."""

MAX_PACKET = 65535
_HEADER = 20
_UDP_HEADER = 8
_TCP_HEADER = 20
_LOOK = struct.Struct(">BxHxxHxBHIIHH")
_ENDS = struct.Struct(">HIIHH")
_ENDS_AT = 10
_TCP_SUM_AT = 36
_FLAGS_AT = 33
_SHORT = struct.Struct(">H")
_IP = struct.Struct(">BBHHHBBHII")
_UDP = struct.Struct(">HHHH")
_TCP = struct.Struct(">HHIIBBHHH")
_TTL = 64

Buffer = bytearray | memoryview | bytes


def parse(buffer: Buffer, size: int) -> tuple[int, int, int, int, int] | None:
    """protocol, source, destination, source port, destination port of the first `size` bytes; None for what is dropped.

    For ICMP the ports are type and code (the first) and the checksum, for other protocols nothing that means anything.
    Dropped are fragments, IP options, wrong lengths, and everything but IPv4.
    """
    if size < _LOOK.size:
        return None
    version, length, fragment, protocol, _, source, destination, source_port, port = _LOOK.unpack_from(buffer)
    if version != 0x45 or length != size or fragment & 0x3FFF:
        return None
    if protocol == TCP:
        if size < _HEADER + _TCP_HEADER or not _TCP_HEADER <= (buffer[32] >> 4) * 4 <= size - _HEADER:
            return None
    elif protocol == UDP:
        if size < _HEADER + _UDP_HEADER or _SHORT.unpack_from(buffer, 24)[0] != size - _HEADER:
            return None
    elif protocol == ICMP and size < _HEADER + 8:
        return None
    return protocol, source, destination, source_port, port


def tcp_flags(buffer: Buffer) -> int:
    """The flags of a parsed TCP packet."""
    return buffer[_FLAGS_AT] & 0x17


def udp_payload(buffer: Buffer, size: int) -> bytes:
    """What a parsed UDP packet carries."""
    return bytes(buffer[_HEADER + _UDP_HEADER : size])


class Rewrite:
    """Gives TCP packets between two ends two other ends, checksums kept right by difference (RFC 1624)."""

    def __init__(self, before: tuple[int, int, int, int], after: tuple[int, int, int, int]) -> None:
        """Each is source, destination, source port, destination port."""
        self._after = after
        self._ip = _difference(before[:2], after[:2], ">II")
        self._tcp = _difference(before, after, ">IIHH")

    def apply(self, buffer: bytearray | memoryview) -> None:
        """Rewrite the packet, which must have the ends `before`."""
        total = (_SHORT.unpack_from(buffer, _ENDS_AT)[0] ^ 0xFFFF) + self._ip
        total = (total & 0xFFFF) + (total >> 16)
        _ENDS.pack_into(buffer, _ENDS_AT, (total + (total >> 16) & 0xFFFF) ^ 0xFFFF, *self._after)
        total = (_SHORT.unpack_from(buffer, _TCP_SUM_AT)[0] ^ 0xFFFF) + self._tcp
        total = (total & 0xFFFF) + (total >> 16)
        _SHORT.pack_into(buffer, _TCP_SUM_AT, (total + (total >> 16) & 0xFFFF) ^ 0xFFFF)


def reset(buffer: Buffer, size: int) -> bytes | None:
    """The answer to a parsed TCP packet that ends its connection; None if it is an RST itself (RFC 9293, 3.5.2)."""
    source, destination, source_port, port = _LOOK.unpack_from(buffer)[5:]
    sequence, acknowledged = struct.unpack_from(">II", buffer, 24)
    flags = tcp_flags(buffer)
    if flags & RST:
        return None
    if flags & ACK:
        return _tcp(destination, source, port, source_port, acknowledged, 0, RST)
    taken = size - _HEADER - (buffer[32] >> 4) * 4 + bool(flags & SYN) + bool(flags & FIN)
    return _tcp(destination, source, port, source_port, 0, (sequence + taken) & 0xFFFFFFFF, RST | ACK)


def probe(source: int, destination: int, source_port: int, port: int) -> bytes:
    """A packet whose answer tells `reset` where an open connection is: a SYN, acknowledged in any state (RFC 5961)."""
    return _tcp(source, destination, source_port, port, 0, 0, SYN)


def unreachable(buffer: Buffer, size: int, code: int, source: int) -> bytes:
    """ICMP's answer to a parsed packet: not delivered, for the reason `code`."""
    quoted = bytes(buffer[: min(size, _HEADER + 8)])
    message = bytearray(struct.pack(">BBHI", 3, code, 0, 0) + quoted)
    _SHORT.pack_into(message, 2, _checksum(message))
    (to,) = struct.unpack_from(">I", buffer, 12)
    return _ip(source, to, ICMP, bytes(message))


def udp(source: int, destination: int, source_port: int, port: int, payload: bytes) -> bytes | None:
    """A UDP packet; None if it would be too long."""
    length = _UDP_HEADER + len(payload)
    if _HEADER + length > MAX_PACKET:
        return None
    # No checksum (RFC 768: zero): both ends of the wire are this machine's memory.
    return _ip(source, destination, UDP, _UDP.pack(source_port, port, length, 0) + payload)


def _tcp(
    source: int, destination: int, source_port: int, port: int, sequence: int, acknowledged: int, flags: int
) -> bytes:
    window = 65535 if flags & SYN else 0
    segment = bytearray(_TCP.pack(source_port, port, sequence, acknowledged, 5 << 4, flags, window, 0, 0))
    pseudo = struct.pack(">IIHH", source, destination, TCP, len(segment))
    _SHORT.pack_into(segment, 16, _checksum(pseudo + segment))
    return _ip(source, destination, TCP, bytes(segment))


def _ip(source: int, destination: int, protocol: int, content: bytes) -> bytes:
    header = bytearray(_IP.pack(0x45, 0, _HEADER + len(content), 0, 0x4000, _TTL, protocol, 0, source, destination))
    _SHORT.pack_into(header, 10, _checksum(header))
    return bytes(header) + content


def _checksum(data: bytes | bytearray) -> int:
    data = bytes(data) + b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def _difference(before: tuple[int, ...], after: tuple[int, ...], layout: str) -> int:
    words = struct.calcsize(layout) // 2
    total: int = sum(struct.unpack(f">{words}H", struct.pack(layout, *after)))
    total += sum(word ^ 0xFFFF for word in struct.unpack(f">{words}H", struct.pack(layout, *before)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total
