"""Packets: whatever comes in, what goes out is a packet with right lengths and checksums, to where it belongs."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from podflare.egress import packets
from podflare.egress.packets import ACK, FIN, RST, SYN, TCP, UDP, Rewrite, parse

A, B, C, D = 0xC6120002, 0x5DB8D822, 0xC6120003, 0xC6120002
numbers = st.integers(0, 2**32 - 1)
ports = st.integers(0, 65535)


def checksum(data: bytes) -> int:
    """As RFC 1071 has it: 0 for data that hold their right checksum."""
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def tcp(flags: int, ends=(A, B, 1000, 80), sequence: int = 5, acknowledged: int = 9, content: bytes = b"") -> bytes:
    source, destination, source_port, port = ends
    segment = bytearray(
        struct.pack(">HHIIBBHHH", source_port, port, sequence, acknowledged, 0x50, flags, 9, 0, 0) + content
    )
    segment[16:18] = struct.pack(">H", checksum(struct.pack(">IIHH", source, destination, TCP, len(segment)) + segment))
    head = bytearray(struct.pack(">BBHHHBBHII", 0x45, 0, 20 + len(segment), 1, 0x4000, 64, TCP, 0, source, destination))
    head[10:12] = struct.pack(">H", checksum(bytes(head)))
    return bytes(head + segment)


def assert_right(packet: bytes) -> None:
    assert len(packet) == struct.unpack(">H", packet[2:4])[0]
    assert checksum(packet[:20]) == 0
    if packet[9] == TCP:
        pseudo = packet[12:20] + struct.pack(">HH", TCP, len(packet) - 20)
        assert checksum(pseudo + packet[20:]) == 0
    elif packet[9] == 1:
        assert checksum(packet[20:]) == 0


@given(st.tuples(numbers, numbers, ports, ports), st.tuples(numbers, numbers, ports, ports), st.binary(max_size=60))
def test_a_rewrite_keeps_checksums_right(before, after, content):
    """Any two pairs of ends can be exchanged, there and back, with checksums right each time."""
    original = tcp(ACK, before, content=content)
    packet = bytearray(original)
    Rewrite(before, after).apply(packet)
    assert_right(bytes(packet))
    assert parse(packet, len(packet))[1:] == after
    assert packet[40:] == content
    Rewrite(after, before).apply(packet)
    assert_right(bytes(packet))
    assert parse(packet, len(packet))[1:] == before


@given(st.binary(max_size=120))
def test_any_bytes_are_a_packet_or_dropped(data):
    """Random bytes are dropped, or have the lengths that answers to them need."""
    buffer = bytearray(data.ljust(65536, b"\0"))
    if data:
        buffer[0] = 0x45 if data[0] % 2 else data[0]
        buffer[2:4] = struct.pack(">H", len(data))
    seen = parse(buffer, len(data))
    if seen is not None:
        assert len(data) >= 24 and seen[0] == buffer[9]
        assert_right(packets.unreachable(buffer, len(data), packets.PROHIBITED, A))
        if seen[0] == TCP and (answer := packets.reset(buffer, len(data))) is not None:
            assert_right(answer)
        if seen[0] == UDP:
            assert len(packets.udp_payload(buffer, len(data))) == len(data) - 28


def test_what_is_dropped():
    """Fragments, options, wrong lengths, other versions and short headers are no packets."""
    good = tcp(SYN)
    assert parse(good, len(good)) == (TCP, A, B, 1000, 80)
    for change in ({0: 0x46}, {0: 0x65}, {2: 1}, {6: 0x20}, {7: 1}, {32: 0x40}, {32: 0xF0}):
        packet = bytearray(good)
        for place, value in change.items():
            packet[place] = value
        assert parse(packet, len(packet)) is None, change
    for size in range(40):
        assert parse(good, size) is None
    datagram = bytearray(packets.udp(A, B, 1, 53, b"hello"))
    datagram[25] += 1
    assert parse(datagram, len(datagram)) is None


@given(st.integers(0, 31), numbers, numbers, st.binary(max_size=9))
def test_resets_are_those_of_the_rfc(flags, sequence, acknowledged, content):
    """An RST answers at the acknowledged number, or acknowledges what came; nothing answers an RST."""
    packet = tcp(flags, sequence=sequence, acknowledged=acknowledged, content=content)
    answer = packets.reset(packet, len(packet))
    if flags & RST:
        assert answer is None
        return
    assert_right(answer)
    assert parse(answer, len(answer)) == (TCP, B, A, 80, 1000)
    there, back = struct.unpack(">II", answer[24:32])
    if flags & ACK:
        assert (there, packets.tcp_flags(answer)) == (acknowledged, RST)
    else:
        taken = len(content) + bool(flags & SYN) + bool(flags & FIN)
        assert (there, back, packets.tcp_flags(answer)) == (0, (sequence + taken) % 2**32, RST | ACK)


def test_answers_go_to_who_asked():
    """ICMP quotes the packet to its sender; a datagram that would be too long is none; a probe is a SYN."""
    packet = tcp(SYN)
    answer = packets.unreachable(packet, len(packet), packets.HOST_UNREACHABLE, C)
    assert_right(answer)
    assert (answer[20], answer[21], answer[28:56]) == (3, 1, packet[:28])
    assert struct.unpack(">II", answer[12:20]) == (C, A)
    datagram = packets.udp(B, A, 53, 4000, b"x" * 1000)
    assert_right(datagram)
    assert parse(datagram, len(datagram)) == (UDP, B, A, 53, 4000)
    assert packets.udp(B, A, 53, 4000, bytes(65536)) is None
    probe = packets.probe(B, A, 80, 1000)
    assert_right(probe)
    assert packets.tcp_flags(probe) == SYN
