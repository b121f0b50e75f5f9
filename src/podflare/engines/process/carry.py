"""A copy of a running machine that is no fork: for machines that lie too deep for the kernel to fork them.

PID namespaces nest 32 deep, so a fork of the last generation cannot be born below its parent.  Its memory is copied
instead, from outside, into a new machine directly below the family (guest/process/carry.py).  The cost follows the
memory in use; the new machine can be forked like the first of its family.
"""

from __future__ import annotations

import json
import platform
import socket
from typing import Any

from podflare.engines.linux.waiting import run_to_end, wait_readable
from podflare.engines.process.birth import (
    STEP_TIMEOUT_S,
    Nursery,
    Unborn,
    give_up,
    let_mount,
    make_directory,
    receive_confined,
    send_order,
)
from podflare.engines.process.fork import (
    REPL_FORK_TIMEOUT_S,
    forget_past,
    prepare_child,
    receive_forked,
    receive_repl,
    send_line,
)
from podflare.engines.process.layers import Layers
from podflare.engines.process.machine import ProcessMachine
from podflare.engines.process.plan import plan_machine
from podflare.errors import MachineFailed

SUPPORTED = platform.machine() == "x86_64"
"""The carrier knows no other processor's registers (guest/process/tracee.py)."""


async def carry_machine(
    nursery: Nursery, layers: Layers, parent: ProcessMachine, hostname: str, *, reseed: bool, timeout_s: float
) -> ProcessMachine:
    """A machine with the memory and files of `parent`, ready for its first cell.

    Precondition: no cell runs in the parent.
    Args:
        timeout_s: when the caller will give up, for those that copy to do so, too.
    Raises: MachineFailed, IsolationIncomplete, DeadlineExceeded; then no such machine exists.
    If cancelled: no such machine exists.
    """
    forget_past(parent.parts.line)
    unborn: Unborn | None = None
    capture = layers.begin(parent.parts.layers)
    try:
        make_directory(nursery, layers.path(capture.layer))
        unborn = prepare_child(nursery, layers, parent, hostname, capture.below)
        plan = plan_machine(unborn.id, unborn.spec, cgroup_walls=nursery.cgroups.walls, layers=capture.below)
        to_target, target = _pair()
        with to_target:
            with target:
                send_order([unborn], [plan], parent.parts.family, below=None, carrier=target.fileno())
            await parent.parts.family.capture(parent.id, capture.layer, capture.merged, parent.spec.limits)
            let_mount(unborn)
            machine = await receive_confined(nursery, unborn)
            await _carry_repl(parent, to_target, reseed=reseed, timeout_s=timeout_s)
        machine.parts.birth.close()
        await receive_repl(nursery, machine)
        await wait_readable(machine.channel, STEP_TIMEOUT_S, "the guest of the forked machine did not start")
    except BaseException:
        given_up = [] if unborn is None else [give_up(unborn, layers)]
        await run_to_end(*given_up, layers.release(capture.held))
        raise
    layers.end(capture)  # nothing may wait from here on, or a cancellation lost the machine
    return machine


async def _carry_repl(parent: ProcessMachine, to_target: socket.socket, *, reseed: bool, timeout_s: float) -> None:
    line = parent.parts.line
    parent.fork_orders += 1
    to_source, source = _pair()
    answer, teller = _pair()
    with to_source, answer:
        with source:
            body = {
                "order": parent.fork_orders,
                "carry": True,
                "reseed": reseed,
                "timeout_s": min(timeout_s, REPL_FORK_TIMEOUT_S),
            }
            send_line(line, body, [source.fileno()])
        with teller:
            family = parent.parts.family
            family.order_carry(to_source.fileno(), to_target.fileno(), teller.fileno(), timeout_s=timeout_s)
        await receive_forked(line, parent.fork_orders)
        to_source.close()  # the carrier has it: from now on its end is everybody's end
        answer.setblocking(False)
        await wait_readable(answer, timeout_s, "the sandbox's memory was not copied")
        data = answer.recv(64 * 1024)
    report: dict[str, Any] = json.loads(data) if data else {"error": "the process that copies it died"}
    if report["error"]:
        raise MachineFailed(f"the sandbox's memory could not be copied: {report['error']}")


def _pair() -> tuple[socket.socket, socket.socket]:
    """The first end is told the pid of who sends at the other one; set here, before anything is sent."""
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    first.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return first, second
