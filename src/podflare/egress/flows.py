"""The TCP connections of one machine, as its packets know them.  No sockets, no clock of its own.

A flow is a connection that a program in the machine opened to some address, and its other half: the connection into
which it is rewritten, from CALLER and a port of the flow's own to the machine's listener.  Which flows are open is
also kept in memory shared with the daemon, so that a new gate can end what an old one has left.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from asyncio import Future
from collections.abc import Iterator
from dataclasses import dataclass

from podflare.egress.addresses import CALLER, MACHINE
from podflare.egress.packets import Rewrite

MAX_LIVE = 256
"""Connections that a machine may have at a time."""
MAX_FLOWS = 1024
"""With those that are over, whose last packets may still come."""
LINGER_S = 10.0
_FIRST_PORT = 1024
_RECORD = struct.Struct("=IHH")
MEMORY_BYTES = 65536 * _RECORD.size
"""At the start of the memory."""
_MACHINE, _CALLER = int(MACHINE), int(CALLER)

WAITING, LET_IN, OVER = "waiting", "let in", "over"


@dataclass(eq=False, slots=True)
class Flow:
    """One connection.

    Attributes:
        key: source port, destination, destination port, as the program sees it.
        port: the port of CALLER that stands for it.
        inward, outward: how its packets are rewritten, towards the listener and back.
        syn: its first packet, held back until the other side is there.
        accepted: the listener's end of it.
    """

    key: tuple[int, int, int]
    port: int
    inward: Rewrite
    outward: Rewrite
    syn: bytes
    accepted: Future[socket.socket]
    state: str = WAITING
    over_at: float = 0.0


class Flows:
    """All flows of a machine."""

    def __init__(self, listener_port: int, memory_fd: int) -> None:
        if os.fstat(memory_fd).st_size < MEMORY_BYTES:
            os.ftruncate(memory_fd, MEMORY_BYTES)
        self._memory = mmap.mmap(memory_fd, MEMORY_BYTES)
        self._listener_port = listener_port
        self._next_port = _FIRST_PORT
        self._over: dict[Flow, None] = {}
        self.by_key: dict[tuple[int, int, int], Flow] = {}
        self.by_port: dict[int, Flow] = {}

    def lost(self) -> Iterator[tuple[int, int, int]]:
        """Keys of what was open, or had just ended, when this memory was another gate's or machine's; told once."""
        for port, (destination, source_port, port_there) in enumerate(_RECORD.iter_unpack(self._memory[:])):
            if destination:
                self._record(port, 0, 0, 0)
                yield source_port, destination, port_there

    def open(self, key: tuple[int, int, int], syn: bytes, accepted: Future[socket.socket], now: float) -> Flow | None:
        """A new flow, in the place of one with this key that is over; None if there are too many."""
        old = self.by_key.get(key)
        if old is not None:
            self._remove(old)
        self._expire(now)
        if len(self.by_key) - len(self._over) >= MAX_LIVE:
            return None
        source_port, destination, port_there = key
        port = self._free_port()
        theirs = (_MACHINE, destination, source_port, port_there)
        ours = (_CALLER, _MACHINE, port, self._listener_port)
        inward = Rewrite(theirs, ours)
        outward = Rewrite((ours[1], ours[0], ours[3], ours[2]), (theirs[1], theirs[0], theirs[3], theirs[2]))
        flow = Flow(key, port, inward, outward, syn, accepted)
        self.by_key[key] = self.by_port[port] = flow
        self._record(port, destination, source_port, port_there)
        return flow

    def end(self, flow: Flow, now: float) -> None:
        """The flow is over; its last packets may pass for a while if it was let in."""
        if self.by_port.get(flow.port) is not flow or flow.state == OVER:
            return
        if flow.state == WAITING:
            self._remove(flow)
            return
        # Its record stays: a fork of the machine that was copied before may have it open still.
        flow.state, flow.over_at = OVER, now
        self._over[flow] = None

    def close(self) -> None:
        self._memory.close()

    def _expire(self, now: float) -> None:
        while self._over:
            oldest = next(iter(self._over))
            if now - oldest.over_at < LINGER_S and len(self.by_key) < MAX_FLOWS:
                return
            self._remove(oldest)

    def _remove(self, flow: Flow) -> None:
        self._over.pop(flow, None)
        self._record(flow.port, 0, 0, 0)
        del self.by_key[flow.key], self.by_port[flow.port]

    def _free_port(self) -> int:
        while True:  # there are sixty times as many ports as flows
            port, self._next_port = self._next_port, max((self._next_port + 1) & 0xFFFF, _FIRST_PORT)
            if port not in self.by_port:
                return port

    def _record(self, port: int, destination: int, source_port: int, port_there: int) -> None:
        _RECORD.pack_into(self._memory, port * _RECORD.size, destination, source_port, port_there)
