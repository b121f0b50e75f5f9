"""How the daemon and the gate talk: numbered orders and answers, JSON in a memory file, descriptors beside it.

The memory file because one packet is too short for a journal.  The gate handles hostile bytes all day, so the daemon
believes none of its answers' sizes and types.
"""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Sequence
from typing import Any

import anyio

from podflare.errors import ProtocolError

MAX_BODY_BYTES = 8 * 1024 * 1024
_MAX_FDS = 4
_MAX_PACKET = 32


async def send(control: socket.socket, number: int, body: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Send one order or answer; `fds` stay the caller's.

    Raises: OSError if the other side is gone.
    """
    memory = os.memfd_create("podflare-order", os.MFD_CLOEXEC)
    try:
        # A new memory file takes everything at once.
        os.write(memory, json.dumps(body).encode())
        while True:
            try:
                socket.send_fds(control, [b"%d" % number], [memory, *fds])
                return
            except BlockingIOError:
                await anyio.wait_writable(control)
    finally:
        os.close(memory)


def receive(control: socket.socket) -> tuple[int, dict[str, Any], list[int]] | None:
    """One waiting order or answer and its descriptors, now the caller's; None at the end of the conversation.

    Raises: BlockingIOError if none waits; ProtocolError if what came is neither.
    """
    try:
        packet, fds, flags, _ = socket.recv_fds(control, _MAX_PACKET, 1 + _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        return None
    kept: list[int] = []
    try:
        if not packet and not fds:
            return None
        if not packet.isdigit() or not fds or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ProtocolError("a packet between daemon and gate is not one")
        number, body = int(packet), _body(fds[0])
        kept = fds[1:]
        return number, body, kept
    finally:
        for fd in fds[: len(fds) - len(kept)]:
            os.close(fd)


def _body(memory: int) -> dict[str, Any]:
    status = os.fstat(memory)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BODY_BYTES:
        raise ProtocolError("a message between daemon and gate is no file, or too large")
    try:
        body = json.loads(os.pread(memory, status.st_size, 0))
    except (ValueError, RecursionError) as error:
        raise ProtocolError("a message between daemon and gate is no JSON") from error
    if not isinstance(body, dict):
        raise ProtocolError("a message between daemon and gate is no object")
    return body
