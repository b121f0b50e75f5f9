"""Fork of a running machine: shells are made for the children, the REPL forks itself into them, each is checked.

All or nothing: if one child does not come to life, none does, and the parent is as it was.
"""

from __future__ import annotations

import array
import asyncio
import json
import os
import socket
import struct
from dataclasses import replace
from typing import Any

from podflare.engines.linux.waiting import run_to_end, wait_readable
from podflare.engines.process import check
from podflare.engines.process.birth import (
    STEP_TIMEOUT_S,
    Nursery,
    Unborn,
    give_up,
    let_mount,
    make_directory,
    prepare,
    receive_confined,
    receive_with_pid,
    send_order,
)
from podflare.engines.process.layers import Layers
from podflare.engines.process.machine import ProcessMachine
from podflare.engines.process.plan import plan_machine
from podflare.errors import MachineFailed

HANDED_FDS = 10
"""Six namespaces, control, stdout, stderr, fork line (guest/branch.ChildFds)."""
MAX_REPORT_NAMES = 64
MAX_PAST_PACKETS = 4096
"""More than a socket holds at a time: who has more to say goes on saying it."""
REPL_FORK_TIMEOUT_S = 10.0
"""At most, for the fork itself in the REPL; hooks of user code run in it."""


async def fork_machine(
    nursery: Nursery,
    layers: Layers,
    parent: ProcessMachine,
    hostnames: list[str],
    *,
    reseed: bool,
    timeout_s: float,
) -> list[ProcessMachine]:
    """Children of `parent`, one for each host name, ready for their first cell.

    Precondition: no cell runs in the parent.
    Args:
        timeout_s: when the caller will give up, for the REPL to do so, too: it is not to stand still for longer.
    Raises: MachineFailed, IsolationIncomplete, DeadlineExceeded; then no child exists.
    If cancelled: no child exists.
    """
    forget_past(parent.parts.line)
    unborn: list[Unborn] = []
    capture = layers.begin(parent.parts.layers)
    try:
        make_directory(nursery, layers.path(capture.layer))
        for hostname in hostnames:
            unborn.append(prepare_child(nursery, layers, parent, hostname, capture.below))
        # Side by side: the agents begin, the files are copied.
        plans = [
            plan_machine(one.id, one.spec, cgroup_walls=nursery.cgroups.walls, layers=capture.below) for one in unborn
        ]
        send_order(unborn, plans, parent.parts.family, below=parent.parts.pid_namespace)
        await parent.parts.family.capture(parent.id, capture.layer, capture.merged, parent.spec.limits)
        for one in unborn:
            let_mount(one)
        # One after the other: they get ready side by side, and nobody is left waiting when one fails.
        children = [await receive_confined(nursery, one) for one in unborn]
        await _fork_repl(nursery, parent, children, reseed=reseed, timeout_s=min(timeout_s, REPL_FORK_TIMEOUT_S))
        for child in children:
            child.parts.birth.close()
    except BaseException:
        await run_to_end(_undo(layers, unborn), layers.release(capture.held))
        raise
    layers.end(capture)  # nothing may wait from here on, or a cancellation lost the children
    return children


def prepare_child(
    nursery: Nursery, layers: Layers, parent: ProcessMachine, hostname: str, below: tuple[str, ...]
) -> Unborn:
    unborn = prepare(nursery, replace(parent.spec, hostname=hostname), parent.parts.family, below)
    layers.retain(below)  # given back when the child's parts are ended
    return unborn


async def _undo(layers: Layers, unborn: list[Unborn]) -> None:
    for one in unborn:
        await give_up(one, layers)


async def _fork_repl(
    nursery: Nursery, parent: ProcessMachine, children: list[ProcessMachine], *, reseed: bool, timeout_s: float
) -> None:
    line = parent.parts.line
    parent.fork_orders += 1
    order = parent.fork_orders
    for number, child in enumerate(children):
        fds = await _receive_handed(child)
        try:
            send_line(line, {"order": order, "child": number}, fds)
        finally:
            for fd in fds:
                os.close(fd)
    send_line(line, {"order": order, "fork": len(children), "reseed": reseed, "timeout_s": timeout_s}, [])
    await receive_forked(line, order)
    for child in children:
        await receive_repl(nursery, child)
    for child in children:
        await wait_readable(child.parts.channel, STEP_TIMEOUT_S, "the guest of the forked machine did not start")


def send_line(line: socket.socket, body: dict[str, Any], fds: list[int]) -> None:
    """One packet on the fork line of a REPL.  Raises: MachineFailed if it is gone."""
    try:
        socket.send_fds(line, [json.dumps(body).encode()], fds)
    except OSError as exc:
        raise MachineFailed(f"the sandbox's Python process cannot be reached: {exc}") from exc


async def receive_forked(line: socket.socket, order: int) -> None:
    """Wait for the REPL's answer to this order.  Raises: MachineFailed if it could not fork; DeadlineExceeded."""
    answer: dict[str, Any] = {}
    while answer.get("order") != order:  # the answer to an order that was given up may come now
        await wait_readable(line, STEP_TIMEOUT_S, "the sandbox's Python process did not fork")
        answer, _ = receive_with_pid(line, "the sandbox's Python process is gone")
        if "started" in answer:
            # What it would fork has none of the state that was to be forked.
            raise MachineFailed("the sandbox's Python process ended while it was forked; a new one was started")
    if answer.get("forked") is not True:
        raise MachineFailed(f"the sandbox's Python process could not fork: {str(answer.get('why'))[:500]}")


def forget_past(line: socket.socket) -> None:
    """Drop what a REPL said before this fork: answers to others, that it was started."""
    try:
        for _ in range(MAX_PAST_PACKETS):
            if not line.recv(1):
                return
    except BlockingIOError:
        return
    except OSError as exc:
        raise MachineFailed(f"the sandbox's Python process cannot be reached: {exc}") from exc
    raise MachineFailed("the sandbox's Python process floods the line for fork orders")


async def _receive_handed(child: ProcessMachine) -> list[int]:
    """The descriptors that the child's REPL-to-be needs, from the child's agent."""
    await wait_readable(child.parts.birth, STEP_TIMEOUT_S, "a new machine did not hand over its namespaces")
    fds = array.array("i")
    # Not recv_fds: the credentials that come along (SO_PASSCRED) need room, too.
    space = socket.CMSG_SPACE(HANDED_FDS * fds.itemsize) + socket.CMSG_SPACE(struct.calcsize("3i"))
    _, ancillary, _, _ = child.parts.birth.recvmsg(4096, space)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    if len(fds) != HANDED_FDS:
        for fd in fds:
            os.close(fd)
        raise MachineFailed("a new machine handed over no namespaces")
    return list(fds)


async def receive_repl(nursery: Nursery, child: ProcessMachine) -> None:
    """Wait for the forked REPL in its machine, check it, give it its control group, let it go."""
    parts = child.parts
    await wait_readable(parts.line, STEP_TIMEOUT_S, "the forked Python process did not report")
    message, pid = receive_with_pid(parts.line, "the forked Python process died on its way")
    if "born" not in message:
        raise MachineFailed(f"the forked Python process died on its way: {str(message.get('died', ''))[:500]}")
    check.check_repl(pid, namespaces=parts.namespaces, filters=parts.filters)
    if parts.cgroup is not None:
        try:
            await asyncio.get_running_loop().run_in_executor(None, parts.cgroup.move, pid)
        except OSError as exc:
            raise MachineFailed(f"the forked Python process could not be put under its limits: {exc}") from exc
    child.fork_report = clean_report(message["born"])
    parts.line.send(b"go")


def clean_report(report: object) -> dict[str, Any]:
    """What a forked REPL says it lost, reduced to the known keys and sane values: user code may have written it."""
    cleaned: dict[str, Any] = {"threads": [], "processes": 0, "sockets": 0, "pipes": 0, "terminals": 0}
    if isinstance(report, dict):
        names = report.get("threads")
        if isinstance(names, list):
            cleaned["threads"] = [str(name)[:100] for name in names[:MAX_REPORT_NAMES]]
        for key in ("processes", "sockets", "pipes", "terminals"):
            value = report.get(key)
            if isinstance(value, int) and 0 <= value < 1 << 20:
                cleaned[key] = value
    return cleaned
