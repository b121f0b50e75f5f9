"""The line between the agent and what started it, where whole machines are saved and copied: a VM's init.

A copy of a machine has the agent's memory with a conversation in it whose other end is elsewhere, so it gets a new
channel.  One packet is one JSON object; knows neither frames nor cells.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass, field
from typing import Dict, Optional

from podflare.guest.link import Descriptor

MAX_PACKET_BYTES = 64 * 1024
_MAX_FDS = 4


@dataclass(frozen=True)
class Mark:
    """The machine is about to be copied."""


@dataclass
class Renew:
    """This machine is a copy: go on with the host at the other end of `channel`."""

    channel: Descriptor
    reseed: bool
    token: bytes
    """Up to which the channel carries what was meant for the former machine; empty: it is a new one."""
    environment: Dict[str, str] = field(default_factory=dict)
    """Variables that all programs get from now on, besides those that they have."""


class SupervisorLine:
    """The agent's end.  Who is at the other end is trusted."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    def fileno(self) -> int:
        return self._sock.fileno()

    def receive(self) -> "Optional[Mark | Renew]":
        """The next order; None if none is there.  Raises: EOFError when the supervisor is gone; ValueError."""
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, MAX_PACKET_BYTES, _MAX_FDS)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as exc:
            raise EOFError(str(exc)) from exc
        if not data:
            raise EOFError("the supervisor is gone")
        for fd in fds:
            os.set_inheritable(fd, False)
        body = json.loads(data)
        if "renew" in body and len(fds) == 1:
            renew = body["renew"]
            token = bytes.fromhex(renew.get("token", ""))
            return Renew(Descriptor(fds[0]), bool(renew.get("reseed", True)), token, renew.get("environment", {}))
        for fd in fds:
            os.close(fd)
        if "mark" in body:
            return Mark()
        raise ValueError(f"unknown order: {data[:200]!r}")

    def answer(self, word: str) -> None:
        """`marked` or `renewed`."""
        self._say({word: True})

    def fail(self, why: str) -> None:
        self._say({"failed": why[:500]})

    def _say(self, body: "dict[str, object]") -> None:
        try:
            self._sock.send(json.dumps(body).encode())
        except OSError:
            pass  # it is gone, which the next `receive` tells
