"""Promise: out of a virtual machine's frames come IPv4 packets of a length that is there, and nothing else."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from podflare.egress import ethernet, packets
from podflare.egress.addresses import GATE, MACHINE

QUESTION = packets.udp(int(MACHINE), int(GATE), 4711, 53, b"name")
assert QUESTION is not None
PACKET = QUESTION
MACS = bytes(12)


def framed(packet: bytes, kind: int = 0x0800, macs: bytes = MACS) -> bytes:
    return macs + struct.pack(">H", kind) + packet


@given(st.binary(max_size=200), st.sampled_from([0x0800, 0x0806, 0x86DD, 0x8100, 0x0000, 0x05DC]))
def test_a_packet_is_never_longer_than_its_frame(content: bytes, kind: int) -> None:
    """Whatever a frame says, the size lies within it; what is no IPv4 gives none; parsing what is left is safe."""
    frame = framed(content, kind)
    size = ethernet.packet_size(frame, len(frame))
    assert 0 <= size <= len(content)
    assert size == 0 or kind == 0x0800
    packets.parse(memoryview(frame)[ethernet.HEADER_BYTES :], size)


@given(st.integers(0, 100), st.binary(min_size=12, max_size=12))
def test_padding_is_cut_off_and_stations_mean_nothing(padding: int, macs: bytes) -> None:
    """A frame that is longer than its packet, from and to any station, carries that packet."""
    frame = framed(PACKET + bytes(padding), macs=macs)
    size = ethernet.packet_size(frame, len(frame))
    assert size == len(PACKET)
    assert packets.parse(memoryview(frame)[ethernet.HEADER_BYTES :], size) is not None


@given(st.integers(0, len(PACKET) - 1))
def test_a_packet_that_was_cut_is_none(kept: int) -> None:
    """A frame with less of its packet than that says to have carries nothing, nor does one without a whole header."""
    frame = framed(PACKET[:kept])
    assert ethernet.packet_size(frame, len(frame)) == 0
    assert ethernet.packet_size(frame + bytes(len(PACKET)), len(frame)) == 0


def test_what_the_machine_gets_is_for_its_interface() -> None:
    """The header before its packets names the machine's station first, another one second, and IPv4."""
    machine, gate = ethernet.TO_MACHINE[:6], ethernet.TO_MACHINE[6:12]
    assert machine != gate and not machine[0] & 1
    assert ethernet.TO_MACHINE[12:] == b"\x08\x00" and len(ethernet.TO_MACHINE) == ethernet.HEADER_BYTES
