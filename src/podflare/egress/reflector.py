"""Reads a machine's packets and has each passed on, answered or dropped.

A machine on this kernel has one tun, whose packets are its programs' and its listener's.  A virtual machine's programs
have a kernel of their own, which sends frames; its tun leads to its listener alone.

Decides nothing: what to do with a new connection, a question for a name, or anything else is its `Owner`'s.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Protocol

from podflare.egress import ethernet, packets
from podflare.egress.addresses import CALLER, DNS_PORT, GATE, MACHINE
from podflare.egress.flows import LET_IN, OVER, WAITING, Flow, Flows

PACKETS_A_TURN = 32
"""Read from one machine before the next one's turn."""
_ACCEPTS_A_TURN = 32
_MACHINE, _CALLER, _GATE = int(MACHINE), int(CALLER), int(GATE)
_MULTICAST = 0xE0000000

# Packets are dealt with one by one, from the read to the write, so one buffer is enough for all machines.
_frame = memoryview(bytearray(ethernet.HEADER_BYTES + packets.MAX_PACKET + 1))
_buffer = _frame[ethernet.HEADER_BYTES :]


class Owner(Protocol):
    """Who decides.  No method may wait."""

    def on_connection(self, flow: Flow) -> bool:
        """A program wants this.  Returns False if it is refused at once; else `let_in` or `refuse` follows."""

    def on_overflow(self, address: int, port: int) -> None:
        """A connection was refused because there are too many."""

    def on_question(self, payload: bytes, source_port: int, address: int) -> None:
        """A datagram for a name server; `answer_question` may follow."""

    def on_refused(self, protocol: str, address: int, port: int) -> None:
        """Something that is neither TCP nor a question was refused."""

    def on_broken(self) -> None:
        """The tun, or the virtual machine, is gone: nothing comes any more."""


class Reflector:
    """One machine's packets.  Owns all descriptors; `close` ends it."""

    def __init__(self, tun: int, listener: socket.socket, frames: int | None, flows: Flows, owner: Owner) -> None:
        """Args: frames: of a virtual machine's interface, each packet a frame."""
        self._tun = tun
        self._frames = frames
        self._held: bytes | None = None
        """A packet of the listener's that the virtual machine has no room for yet; until then no other is read."""
        self._listener = listener
        self._listener_port: int = listener.getsockname()[1]
        self._flows = flows
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        os.set_blocking(tun, False)
        listener.setblocking(False)
        self._loop.add_reader(tun, self._read)
        if frames is not None:
            os.set_blocking(frames, False)
            self._loop.add_reader(frames, self._read_frames)
        self._loop.add_reader(listener.fileno(), self._accept)

    def end_lost(self) -> None:
        """Make the machine's kernel say where the connections of an earlier gate are, so that they get an RST."""
        for source_port, address, port in self._flows.lost():
            self._to_machine(packets.probe(address, _MACHINE, port, source_port))

    def let_in(self, flow: Flow) -> None:
        """The other side is there: the program's connection may begin."""
        if flow.state == WAITING:
            flow.state = LET_IN
            packet = bytearray(flow.syn)
            flow.inward.apply(packet)
            self._to_listener(packet)

    def refuse(self, flow: Flow, *, unreachable: bool) -> None:
        """The program's connection fails: refused by the other side, or `unreachable`."""
        syn = flow.syn
        if unreachable:
            self._to_machine(packets.unreachable(syn, len(syn), packets.HOST_UNREACHABLE, _GATE))
        elif (answer := packets.reset(syn, len(syn))) is not None:
            self._to_machine(answer)

    def answer_question(self, payload: bytes, source_port: int, address: int) -> None:
        """A name server's answer to what came from this port for this address."""
        if (packet := packets.udp(address, _MACHINE, DNS_PORT, source_port, payload)) is not None:
            self._to_machine(packet)

    def close(self) -> None:
        """Stop.  Idempotent."""
        if self._tun >= 0:
            self._loop.remove_reader(self._tun)
            self._loop.remove_reader(self._listener.fileno())
            os.close(self._tun)
            self._listener.close()
            self._tun = -1
            if self._frames is not None:
                self._loop.remove_reader(self._frames)
                self._loop.remove_writer(self._frames)
                os.close(self._frames)

    def _read(self) -> None:
        for _ in range(PACKETS_A_TURN):
            if self._tun < 0 or self._held is not None:
                return
            size = self._receive(self._tun, _buffer)
            if size == 0:
                return
            if self._frames is None:
                self._take(size)
            else:
                self._take_from_listener(size)

    def _read_frames(self) -> None:
        for _ in range(PACKETS_A_TURN):
            if self._tun < 0 or self._frames is None:
                return
            size = self._receive(self._frames, _frame)
            if size == 0:
                return
            size = ethernet.packet_size(_frame, size)
            if size:
                self._take(size)

    def _receive(self, fd: int, into: memoryview) -> int:
        """How many bytes came; 0 if none did."""
        try:
            size = os.readv(fd, (into,))
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            size = 0
        if size == 0:
            self._loop.remove_reader(fd)
            self._owner.on_broken()
        return size

    def _take_from_listener(self, size: int) -> None:
        """A packet of the kernel that the listener of a virtual machine is in."""
        seen = packets.parse(_buffer, size)
        if seen is not None:
            protocol, _, destination, source_port, port = seen
            if protocol == packets.TCP and destination == _CALLER and source_port == self._listener_port:
                self._bring_back(port, size)

    def _bring_back(self, port: int, size: int) -> None:
        """What the listener's end of a connection sends to its caller is the program's."""
        flow = self._flows.by_port.get(port)
        if flow is None or flow.state == WAITING:
            if (answer := packets.reset(_buffer, size)) is not None:
                self._to_listener(answer)
            return
        flow.outward.apply(_buffer)
        if not self._to_machine(_buffer[:size]) and self._frames is not None:
            self._held = bytes(_buffer[:size])
            self._loop.remove_reader(self._tun)
            self._loop.add_writer(self._frames, self._send_held)

    def _send_held(self) -> None:
        if self._held is not None and self._frames is not None and self._to_machine(self._held):
            self._held = None
            self._loop.remove_writer(self._frames)
            self._loop.add_reader(self._tun, self._read)

    def _take(self, size: int) -> None:
        """A packet of the machine's programs, or of its listener where both are on one tun."""
        seen = packets.parse(_buffer, size)
        if seen is None:
            return
        protocol, source, destination, source_port, port = seen
        if source != _MACHINE:
            return
        if protocol == packets.TCP:
            if self._frames is None and destination == _CALLER and source_port == self._listener_port:
                self._bring_back(port, size)
                return
            flow = self._flows.by_key.get((source_port, destination, port))
            only_syn = packets.tcp_flags(_buffer) == packets.SYN
            if only_syn and (flow is None or flow.state == OVER):
                self._connect((source_port, destination, port), size)
            elif flow is None:
                self._reset(size)
            elif flow.state != WAITING:
                flow.inward.apply(_buffer)
                self._to_listener(_buffer[:size])
        elif protocol == packets.UDP and port == DNS_PORT:
            self._owner.on_question(packets.udp_payload(_buffer, size), source_port, destination)
        else:
            self._prohibit(protocol, destination, port, size)

    def _connect(self, key: tuple[int, int, int], size: int) -> None:
        flow = self._flows.open(key, bytes(_buffer[:size]), self._loop.create_future(), self._loop.time())
        if flow is None:
            self._owner.on_overflow(key[1], key[2])
            self._reset(size)
        elif not self._owner.on_connection(flow):
            self._flows.end(flow, self._loop.time())
            self._reset(size)

    def _reset(self, size: int) -> None:
        if (answer := packets.reset(_buffer, size)) is not None:
            self._to_machine(answer)

    def _prohibit(self, protocol: int, destination: int, port: int, size: int) -> None:
        if protocol == packets.ICMP and _buffer[20] != packets.ECHO_REQUEST:
            return  # an error must not be answered with an error
        known = {packets.UDP: "udp", packets.ICMP: "icmp"}.get(protocol)
        self._owner.on_refused(known or "other", destination, port if known == "udp" else 0)
        if destination < _MULTICAST:
            code = packets.PROHIBITED if known else packets.PROTOCOL_UNREACHABLE
            self._to_machine(packets.unreachable(_buffer, size, code, _GATE))

    def _to_machine(self, packet: packets.Buffer) -> bool:
        """Returns False if it was not sent because a virtual machine has too many unread."""
        if self._frames is None:
            self._to_listener(packet)
        elif self._tun >= 0:
            try:
                os.writev(self._frames, (ethernet.TO_MACHINE, packet))
            except BlockingIOError:
                return False
            except OSError:
                pass  # as below
        return True

    def _to_listener(self, packet: packets.Buffer) -> None:
        if self._tun >= 0:
            try:
                os.write(self._tun, packet)
            except OSError:
                pass  # as on any network a packet may be lost; one that the kernel does not take is no loss

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            try:
                sock, peer = self._listener.accept()
            except OSError:
                return
            flow = self._flows.by_port.get(peer[1]) if peer[0] == str(CALLER) else None
            if flow is None or flow.state != LET_IN or flow.accepted.done():
                sock.close()  # a program that found the listener by itself
                continue
            sock.setblocking(False)
            flow.accepted.set_result(sock)
