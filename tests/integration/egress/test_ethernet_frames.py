"""Promise: a virtual machine's kernel may send what it likes: it gets what its policy allows, and hurts itself alone.

No virtual machine runs here: the tests play its kernel, at the socket that QEMU would have, or at the tap that
Firecracker would.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal

import worlds
from podflare.egress import ethernet, packets
from podflare.egress.addresses import CALLER, GATE, MACHINE
from podflare.egress.keeper import GateKeeper
from podflare.egress.policy import Policy
from podflare.engines.microvm.landing import Landing
from podflare.engines.microvm.outpost import Outpost
from podflare.engines.microvm.tap import Tap
from podflare.errors import EgressUnavailable
from podflare.wire.egress import EgressEntry
from taps import TapEnd

WAIT_S = 20.0
WEB = int.from_bytes(socket.inet_aton(worlds.WEB), "big")
US, CALLED, GATEWAY = int(MACHINE), int(CALLER), int(GATE)
SYN, ACK, RST, PUSH = packets.SYN, packets.ACK, packets.RST, 8
LINK_LOCAL, ALL_NODES = b"\xfe\x80" + bytes(6), b"\xff\2" + bytes(13) + b"\1"
FROM_MACHINE = ethernet.TO_MACHINE[6:12] + ethernet.TO_MACHINE[:6]


def tcp(
    port: int,
    flags: int,
    seq: int = 0,
    ack: int = 0,
    data: bytes = b"",
    *,
    to: int = WEB,
    dport: int = 80,
    source: int = US,
) -> bytes:
    """An IPv4 packet with a TCP segment."""
    options = struct.pack(">BBH", 2, 4, 1460) if flags & SYN else b""
    head = struct.pack(">HHIIBBHHH", port, dport, seq, ack, (20 + len(options)) << 2, flags, 65535, 0, 0)
    segment = bytearray(head + options + data)
    pseudo = struct.pack(">IIHH", source, to, packets.TCP, len(segment))
    struct.pack_into(">H", segment, 16, packets._checksum(pseudo + segment))
    return packets._ip(source, to, packets.TCP, bytes(segment))


class Segment:
    """A TCP segment that the machine received."""

    def __init__(self, packet: bytes) -> None:
        assert packet[9] == packets.TCP, packet
        self.source = int.from_bytes(packet[12:16], "big")
        self.sport, self.port, self.seq, self.ack, offset, self.flags = struct.unpack_from(">HHIIBB", packet, 20)
        self.data = packet[20 + (offset >> 4) * 4 :]


class PlayedVm:
    """The kernel of a virtual machine and the way out that its engine would give it."""

    frames: socket.socket | TapEnd
    """The machine's end."""
    theirs: socket.socket

    def __init__(self, portal: BlockingPortal, keeper: GateKeeper, key: str, wire: str) -> None:
        self._portal, self._keeper, self.key = portal, keeper, key
        if wire == "tap":
            with contextlib.closing(Tap(None)) as tap:
                self.theirs = portal.call(tap.frames)
                self.frames = TapEnd(portal.call(tap.entrance))
        else:
            self.frames, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self.frames.settimeout(WAIT_S)
        self._landing = Landing()
        self._done: set[int] = set()
        self.tun, self.listener = portal.call(self._landing.ends)

    @property
    def ends(self) -> tuple[int, int, int]:
        return self.tun, self.listener, self.theirs.fileno()

    def attach(self, egress: bool | list[str]) -> None:
        self._portal.call(self._keeper.prepare, self.key, Policy.parse(egress), {})
        self._portal.call(self._keeper.attach, self.key, *self.ends)

    def send(self, packet: bytes) -> None:
        self.send_frame(FROM_MACHINE + b"\x08\x00" + packet)

    def send_frame(self, frame: bytes) -> None:
        self.frames.send(frame)

    def receive(self) -> bytes:
        """The next packet, but for what still comes of connections that `ask` is done with."""
        while True:
            frame = self.frames.recv(70_000)
            assert frame[: ethernet.HEADER_BYTES] == ethernet.TO_MACHINE
            packet = frame[ethernet.HEADER_BYTES :]
            if packet[9] != packets.TCP or Segment(packet).port not in self._done:
                return packet

    def silent(self) -> bool:
        """Whether nothing waits to be received, once the gate has read all that was sent: it answers in this order."""
        self.send(tcp(1, ACK, dport=9, seq=7, ack=99))
        return Segment(self.receive()).seq == 99

    def open(self, port: int, dport: int = 80) -> tuple[int, int]:
        """A connection to the web server.  Returns our and their next sequence number."""
        self.send(tcp(port, SYN, seq=1000, dport=dport))
        answer = Segment(self.receive())
        assert (answer.source, answer.sport, answer.port, answer.flags & (SYN | ACK)) == (WEB, dport, port, SYN | ACK)
        self.send(tcp(port, ACK, 1001, answer.seq + 1, dport=dport))
        return 1001, answer.seq + 1

    def ask(self, port: int, path: str) -> bytes:
        """What the web server says first."""
        ours, theirs = self.open(port)
        request = f"GET {path} HTTP/1.0\r\n\r\n".encode()
        self.send(tcp(port, ACK | PUSH, ours, theirs, request))
        while not (segment := Segment(self.receive())).data:
            pass
        self._done.add(port)
        self.send(tcp(port, RST, ours + len(request)))
        return segment.data

    def journal(self) -> list[EgressEntry]:
        return list(self._portal.call(self._keeper.journal, self.key)[0])

    def close(self) -> None:
        self._portal.call(self._keeper.detach, self.key)
        self._landing.close()
        self.frames.close()
        self.theirs.close()


@pytest.fixture
def wire() -> str:
    """What the machines of a test are on: "socket" or "tap"."""
    return "socket"


on_both = pytest.mark.parametrize("wire", ["socket", "tap"])
on_tap = pytest.mark.parametrize("wire", ["tap"])


@pytest.fixture
def played(portal: BlockingPortal, keeper: GateKeeper, wire: str) -> Iterator[Callable[..., PlayedVm]]:
    """Makes machines, attached if `egress` is given; all are closed at the end of the test."""
    made: list[PlayedVm] = []

    def make(egress: bool | list[str] | None = None) -> PlayedVm:
        made.append(PlayedVm(portal, keeper, f"played_{len(made)}", wire))
        if egress is not None:
            made[-1].attach(egress)
        return made[-1]

    yield make
    for one in made:
        one.close()


@on_both
def test_a_machine_of_frames_reaches_what_it_may(played: Callable[..., PlayedVm]) -> None:
    """Connections, refusals, names and answers to datagrams come and go as frames; the log is as for any machine."""
    vm = played([worlds.WEB])
    assert vm.ask(2001, "/hello").startswith(b"HTTP/1.1 200")
    vm.send(tcp(2002, SYN, seq=5, to=WEB + 1))
    refused = Segment(vm.receive())
    assert refused.flags & RST and (refused.source, refused.ack) == (WEB + 1, 6)
    datagram = packets.udp(US, WEB, 4000, 123, b"time?")
    assert datagram is not None
    vm.send(datagram)
    assert vm.receive()[20:22] == bytes((3, packets.PROHIBITED))
    assert [one.verdict for one in vm.journal()] == ["allowed", "refused", "refused"]


@on_both
def test_what_is_no_packet_of_the_machine_is_dropped(played: Callable[..., PlayedVm], wire: str) -> None:
    """Frames that are none, of other protocols, from other addresses, in fragments or with false lengths do nothing."""
    vm = played(True)
    good = tcp(3000, SYN)
    fragment = bytearray(good)
    fragment[6] = 0x20
    options = bytearray(packets._ip(US, WEB, packets.TCP, b"\1" * 4 + good[20:]))
    options[0] = 0x46
    # The kernel that has the tap takes a network's number off, and the machine has no second network: it is ignored.
    tagged = [] if wire == "tap" else [FROM_MACHINE + b"\x81\0\0\1\x08\0" + good]
    for frame in (
        b"x", bytes(13), bytes(14), bytes(33), bytes(60), bytes(70_000),
        FROM_MACHINE + b"\x08\x06" + b"\0\1\x08\0\6\4\0\1" + bytes(20),
        FROM_MACHINE + b"\x86\xdd" + good, FROM_MACHINE + b"\x00\x40" + good, *tagged,
        *(FROM_MACHINE + b"\x08\x00" + packet for packet in (
            tcp(3001, SYN, source=WEB), tcp(3002, SYN, source=CALLED), tcp(3003, SYN, source=GATEWAY),
            tcp(3004, SYN, source=0), tcp(3005, SYN, source=0x7F000001),
            bytes(fragment), bytes(options), good[:30], good[:2] + b"\xff\xff" + good[4:], b"\x65" + good[1:],
        )),
    ):  # fmt: skip
        vm.send_frame(frame)
    assert vm.silent()
    assert vm.journal() == []
    assert vm.ask(3010, "/after").startswith(b"HTTP/1.1 200")


@on_both
def test_stations_are_not_believed(played: Callable[..., PlayedVm]) -> None:
    """A frame from any station, to any station, is the machine's whose wire it came by: its rules, its answers."""
    vm, neighbour = played([worlds.OTHER_WEB]), played(True)
    for number, stations in enumerate((bytes(12), b"\xff" * 12, FROM_MACHINE[6:] + FROM_MACHINE[:6])):
        vm.send_frame(stations + b"\x08\x00" + tcp(3100 + number, SYN))
        assert Segment(vm.receive()).flags & RST
    assert neighbour.silent() and neighbour.journal() == []


@on_both
def test_nobody_poses_as_the_gates_own_ends(played: Callable[..., PlayedVm]) -> None:
    """Segments as if from the listener, from who is let in to it, or to it, do not reach its namespace."""
    vm = played(True)
    with socket.socket(fileno=os.dup(vm.listener)) as listener:
        listening = listener.getsockname()[1]
        assert vm.ask(3200, "/accepted").startswith(b"HTTP/1.1 200")
        vm.send(tcp(1024, SYN, source=CALLED, to=US, dport=listening))
        for port in (*range(1024, 1030), 4711):
            vm.send(tcp(listening, SYN | ACK, to=CALLED, dport=port, seq=1, ack=1001))
            assert Segment(vm.receive()).flags & RST
        vm.send(tcp(3201, SYN, to=US, dport=listening))
        assert Segment(vm.receive()).flags & RST
        vm.send(tcp(3202, SYN, to=CALLED, dport=1024))
        assert Segment(vm.receive()).flags & RST
        assert vm.silent()
        assert not select.select([listener], [], [], 0)[0]


@on_both
def test_garbage_and_floods_hurt_nobody_else(played: Callable[..., PlayedVm]) -> None:
    """Thousands of random frames and of connections at a time leave a neighbour served, and the log at its size."""
    vm, neighbour = played(True), played([worlds.WEB])
    draw = random.Random(4711)
    vm.frames.setblocking(False)
    for number in range(6000):
        if number % 2:
            frame = bytearray(FROM_MACHINE + b"\x08\x00" + tcp(number & 0xFFFF, SYN, dport=7001))
            for _ in range(draw.randrange(3)):
                frame[draw.randrange(12, len(frame))] = draw.randrange(256)
        else:
            frame = bytearray(draw.randbytes(draw.randrange(1, 3000)))
        while True:
            try:
                vm.frames.send(frame)
                break
            except BlockingIOError:
                ready = select.select([vm.frames], [vm.frames], [], WAIT_S)
                assert ready[0] or ready[1]
                if ready[0]:
                    vm.frames.recv(70_000)
    assert neighbour.ask(3300, "/neighbour").startswith(b"HTTP/1.1 200")
    assert len(vm.journal()) <= 1000


def test_what_the_machine_does_not_read_waits_and_is_not_lost(played: Callable[..., PlayedVm]) -> None:
    """What a socket between processes has no room for is not dropped: others are served meanwhile, and then all of it
    comes, without an acknowledgement that would have any of it sent again but the first."""
    vm, neighbour = played(True), played(True)
    vm.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 6000)
    ours, theirs = vm.open(3400, 7003)
    size = 6 * 1460  # TCP sends ten segments at the start of a connection; they may be cut smaller than this
    vm.send(tcp(3400, ACK | PUSH, ours, theirs, f"{size}\n".encode(), dport=7003))
    deadline = time.monotonic() + WAIT_S
    while sum(one.bytes_in for one in vm.journal()) < size:
        assert time.monotonic() < deadline
    assert neighbour.ask(3401, "/meanwhile").startswith(b"HTTP/1.1 200")
    came: dict[int, int] = {}
    while (whole := _reach(came)) < size:
        segment = Segment(vm.receive())
        if segment.data:
            came[segment.seq - theirs] = len(segment.data)
    assert whole == size


def _reach(came: dict[int, int]) -> int:
    """How far it goes without a gap.  `came`: lengths by position."""
    end = 0
    for start in sorted(came):
        if start <= end:
            end = max(end, start + came[start])
    return end


@on_tap
def test_nobody_is_on_the_wire_between_machine_and_gate(played: Callable[..., PlayedVm]) -> None:
    """The kernel that has the tap answers nothing that it is asked, by its address, everybody's or the gate's own."""
    vm = played(True)
    assert isinstance(vm.frames, TapEnd)
    tap, us, everybody = vm.frames.station, FROM_MACHINE[6:12], b"\xff" * 6
    asks = b"\0\1\x08\0\6\4\0\1" + us + socket.inet_aton(str(MACHINE)) + bytes(6)
    echo = packets._ip(WEB, 0, packets.ICMP, b"\x08\0\xf7\xff\0\0\0\0")
    query = packets._ip(WEB, int.from_bytes(bytes((224, 0, 0, 1)), "big"), 2, b"\x11\x01\xee\xfe\0\0\0\0")
    neighbour = struct.pack(">IHBB", 6 << 28, 32, 58, 255) + (LINK_LOCAL + bytes(7) + b"\1") + ALL_NODES
    for to in (tap, everybody, b"\x01\0\x5e\0\0\1", b"\x33\x33\0\0\0\1"):
        for address in ("127.0.0.1", "198.18.0.1", "198.18.0.2", "224.0.0.1", "255.255.255.255", "0.0.0.0"):
            number = socket.inet_aton(address)
            vm.send_frame(to + us + b"\x08\x06" + asks + number)
            packet = bytearray(echo[:16] + number + echo[20:])
            struct.pack_into(">H", packet, 10, 0)
            struct.pack_into(">H", packet, 10, packets._checksum(packet[:20]))
            vm.send_frame(to + us + b"\x08\x00" + bytes(packet))
        vm.send_frame(to + us + b"\x08\x00" + query)
        for kind in (128, 130, 133, 135):
            vm.send_frame(to + us + b"\x86\xdd" + neighbour + bytes((kind, 0)) + bytes(30))
        vm.send_frame(to + us + b"\x08\x00" + tcp(3700, SYN, source=CALLED, to=US, dport=80))
    assert vm.silent()


@on_tap
def test_what_a_machine_leaves_to_its_device(played: Callable[..., PlayedVm]) -> None:
    """Headers of all kinds before frames, as a hostile driver writes them, harm nobody, and not the wire."""
    vm, neighbour = played(True), played([worlds.WEB])
    assert isinstance(vm.frames, TapEnd)
    draw = random.Random(4711)
    for number in range(500):
        # struct virtio_net_hdr_v1: flags, kind, length of headers, of segments, where a sum begins and goes, buffers
        wild = (
            number % 4,
            draw.choice((0, 1, 3, 4, 0x81, 255)),
            *(draw.choice((0, 1, 14, 34, 54, 65535)) for _ in "1234"),
        )
        data = bytes(draw.choice((0, 1, 1460, 60_000)))
        frame = FROM_MACHINE + b"\x08\x00" + tcp(3800 + number % 9, draw.choice((SYN, ACK)), data=data)
        vm.frames.send(frame, struct.pack("=BBHHHHH", *wild, 0))
    assert neighbour.ask(3820, "/neighbour").startswith(b"HTTP/1.1 200")
    again = played([worlds.WEB])
    assert again.ask(3821, "/again").startswith(b"HTTP/1.1 200")
    vm.send(tcp(3822, ACK, seq=5, ack=99))
    while not (Segment(packet).seq == 99 if (packet := vm.receive())[9] == packets.TCP else False):
        pass


def test_where_it_cannot_be_made(portal: BlockingPortal) -> None:
    """A network that cannot be made is refused with what the system said, and nothing of it is left."""
    outpost = Outpost("tap", "no/name", "0", count=3)
    try:
        with pytest.raises(EgressUnavailable, match=r"can have no network here: .*Invalid argument"):
            portal.call(outpost.descriptors)
    finally:
        outpost.close()
        outpost.close()


@on_both
def test_a_forks_connections_are_ended(
    played: Callable[..., PlayedVm], portal: BlockingPortal, keeper: GateKeeper
) -> None:
    """What a machine had open when it was copied is reset in the copy, also where that only waits, and goes on in it;
    so is what ended in it just after."""
    vm, child = played(True), played()
    ours, theirs = vm.open(3500, 7000)
    assert vm.ask(3501, "/ended").startswith(b"HTTP/1.1 200")
    portal.call(keeper.branch, child.key, vm.key, *child.ends)
    probes = [Segment(child.receive()), Segment(child.receive())]
    assert [(one.source, one.sport, one.port, one.flags) for one in probes] == [
        (WEB, 7000, 3500, SYN),
        (WEB, 80, 3501, SYN),
    ]
    child.send(tcp(3500, ACK, ours, theirs, dport=7000))  # what a kernel answers that has the connection (RFC 5961)
    ended = Segment(child.receive())
    assert ended.flags & RST and ended.seq == theirs
    assert child.ask(3500, "/the-same-port").startswith(b"HTTP/1.1 200")
    vm.send(tcp(3500, ACK | PUSH, ours, theirs, b"echo", dport=7000))
    while not (segment := Segment(vm.receive())).data:
        pass
    assert segment.data == b"echo"


def test_the_end_of_a_hypervisor_ends_its_network(
    played: Callable[..., PlayedVm], network: Callable[..., Any], world: worlds.World
) -> None:
    """When the other end of the frames is closed, or sends nothing at all, its connections end; those of others go on."""
    closed, empty, other = played(True), played(True), network(True)
    for vm in (closed, empty):
        vm.open(3600, 7001)
    closed.frames.close()
    closed.theirs.close()
    empty.frames.send(b"")
    deadline = time.monotonic() + WAIT_S
    while sockets_to(world, 7001):
        assert time.monotonic() < deadline
        time.sleep(0.01)  # the gate closes them in its own time
    assert other.run("tell(talk((HOST, 80), b'GET / HTTP/1.0\\r\\n\\r\\n')[:12])", HOST=worlds.WEB) == "HTTP/1.1 200"


def sockets_to(world: worlds.World, port: int) -> int:
    """Connections of the gate that are open."""
    middle = world.enter[world.enter.index("--target") + 1]
    rows = [row.split() for row in Path(f"/proc/{middle}/net/tcp").read_text().splitlines()[1:]]
    return sum(row[2].endswith(f":{port:04X}") and row[3] == "01" for row in rows)
