"""Which files two machines have otherwise: ordered from a family, which looks at their layers on its stage.

The daemon itself opens nothing that user code made.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from typing import Any

from podflare.engines.linux.waiting import wait_readable
from podflare.engines.process.machine import ProcessMachine
from podflare.errors import MachineFailed, TooLarge
from podflare.wire.api import Diff, PathChange

MAX_PATHS_BYTES = 64 * 1024
"""Of all paths as JSON: an order is one packet."""
MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""It comes as a file in memory, and costs several times its size once it is read."""


async def compare_machines(
    before: ProcessMachine, after: ProcessMachine, paths: tuple[str, ...], *, detail: bool, timeout_s: float
) -> Diff:
    """See engines.base.Machine.diff.

    If cancelled: the process that compares goes on for at most timeout_s and is heard by nobody.
    """
    if len(json.dumps(paths)) > MAX_PATHS_BYTES:
        raise TooLarge(f"the paths to compare are too long: more than {MAX_PATHS_BYTES} bytes together")
    order: dict[str, Any] = {
        "before": [before.id, *before.parts.layers],
        "after": [after.id, *after.parts.layers],
        "paths": paths,
        "detail": detail,
        "timeout_s": timeout_s,
    }
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    with ours:
        ours.setblocking(False)
        with theirs:
            before.parts.family.order_comparison(order, theirs.fileno())
        await wait_readable(ours, timeout_s, "the sandboxes' files were not compared")
        data, fds, _, _ = socket.recv_fds(ours, 64 * 1024, 1)
    for fd in fds:
        os.set_inheritable(fd, False)
    # While it was looked at, a machine may have been closed and its layers removed: that is no difference.
    closed = [machine.id for machine in (before, after) if machine.is_closed]
    try:
        if closed:
            raise MachineFailed(f"machine {closed[0]} is gone")
        if not data:
            raise MachineFailed("the process that compares the sandboxes' files died")
        answer: dict[str, Any] = json.loads(data)
        if answer["error"]:
            text = f"the sandboxes' files could not be compared: {answer['error']}"
            raise TooLarge(text) if answer["too_much"] else MachineFailed(text)
        return await asyncio.get_running_loop().run_in_executor(None, _read, fds[0])
    finally:
        for fd in fds:
            os.close(fd)


def _read(fd: int) -> Diff:
    """The answer itself.  In a thread: it can have many megabytes."""
    size = os.fstat(fd).st_size
    if size > MAX_ANSWER_BYTES:
        raise TooLarge(f"the sandboxes differ in too much: an answer of {size} bytes")
    body: dict[str, Any] = json.loads(os.pread(fd, size, 0))
    detail = body["detail"]
    return Diff(
        added=tuple(body["added"]),
        removed=tuple(body["removed"]),
        modified=tuple(body["modified"]),
        detail=None if detail is None else {path: PathChange(**change) for path, change in detail.items()},
    )
