"""The daemon's part in the birth of a machine: prepare, order, look at it from outside, let it go."""

from __future__ import annotations

import array
import json
import os
import secrets
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from podflare.engines.base import EngineOptions, MachineSpec, UplinkEnds, Wall
from podflare.engines.linux.cgroups import Cgroup, Cgroups
from podflare.engines.linux.ending import remove_tree
from podflare.engines.linux.waiting import wait_readable
from podflare.engines.process import check
from podflare.engines.process.family import Family
from podflare.engines.process.layers import Layers, take_away
from podflare.engines.process.machine import Parts, ProcessMachine
from podflare.engines.process.plan import ROOT_FIRST_ID
from podflare.errors import IsolationIncomplete, MachineFailed

STEP_TIMEOUT_S = 60.0
"""Bounds each wait by itself; the deadline of the whole is the caller's and nearer."""
MAX_REPORT_BYTES = 64 * 1024


@dataclass(frozen=True)
class Nursery:
    """What every birth of one engine needs."""

    options: EngineOptions
    machines_dir: Path
    cgroups: Cgroups
    root: bool
    filters: int
    """How many seccomp programs each machine loads."""


@dataclass
class Unborn:
    """A machine that is ordered but not let go yet."""

    id: str
    spec: MachineSpec
    parts: Parts
    theirs: list[socket.socket]
    """The guest's ends of its sockets, until they are sent."""


async def give_up(unborn: Unborn, layers: Layers) -> None:
    """Take away a machine that is not to be, however far it has come."""
    for sock in unborn.theirs:
        sock.close()
    await take_away(unborn.parts, layers)


def prepare(nursery: Nursery, spec: MachineSpec, family: Family, layers: tuple[str, ...] = ()) -> Unborn:
    """The host's half of a new machine.  Raises: MachineFailed; then nothing of it is left.  Ended by `end_parts`."""
    machine_id = secrets.token_hex(8)
    directory = nursery.machines_dir / machine_id
    pairs: list[tuple[socket.socket, socket.socket]] = []
    group: Cgroup | None = None
    try:
        make_directory(nursery, directory)
        if nursery.cgroups.version:
            group = nursery.cgroups.create(nursery.options.instance, machine_id, spec.limits)
        for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_SEQPACKET):
            pairs.append(socket.socketpair(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC))
    except OSError as exc:
        for ours, theirs in pairs:
            ours.close()
            theirs.close()
        if group is not None:
            group.remove(timeout_s=1)
        remove_tree(directory)
        raise MachineFailed(f"a new machine could not be prepared: {exc}") from exc
    channel, birth, line = (ours for ours, _ in pairs)
    for sock in (channel, birth, line):
        sock.setblocking(False)
    for sock in (birth, line):
        # What is said on these comes with the sender's pid, stated by the kernel (SCM_CREDENTIALS, unix(7)).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    family.members += 1
    parts = Parts(family, directory, group, channel, birth, line, layers=layers)
    return Unborn(machine_id, spec, parts, [theirs for _, theirs in pairs])


def make_directory(nursery: Nursery, directory: Path) -> None:
    """A directory that, besides a root daemon, only its machines' ids can enter."""
    directory.mkdir(mode=0o700)
    if nursery.root:
        os.chown(directory, ROOT_FIRST_ID, ROOT_FIRST_ID)


def send_order(
    unborn: list[Unborn], plans: list[Any], family: Family, *, below: int | None, carrier: int | None = None
) -> None:
    """Order the machines of one family, and let go of the descriptors that are theirs now."""
    procs: list[int] = []
    fds: list[int] = []
    try:
        for one in unborn:
            opened = one.parts.cgroup.open_procs() if one.parts.cgroup else []
            procs += opened
            fds += [sock.fileno() for sock in one.theirs] + opened
        family.order_machines(plans, fds, below=below, carrier=carrier)
    finally:
        for fd in procs:
            os.close(fd)
        for one in unborn:
            for sock in one.theirs:
                sock.close()
            one.theirs = []


def let_mount(unborn: Unborn) -> None:
    """Tell the agent that the layers of its root are there.  Raises: MachineFailed if it is gone."""
    try:
        unborn.parts.birth.send(b"mount")
    except OSError as exc:
        raise MachineFailed(f"the new machine died at its birth: {exc}") from exc


async def receive_confined(nursery: Nursery, unborn: Unborn) -> ProcessMachine:
    """Wait for the agent's report, look at it from outside, let it go.

    Raises: IsolationIncomplete with the step or the walls that failed; MachineFailed; DeadlineExceeded.
    """
    parts = unborn.parts
    await wait_readable(parts.birth, STEP_TIMEOUT_S, "the new machine did not report")
    message, pid, fds = _receive(parts.birth, "the new machine died while it was being confined", max_fds=2)
    if len(fds) == 2:
        parts.uplink = UplinkEnds(*fds)
    if "error" in message:
        raise IsolationIncomplete(f"a machine could not be confined: {message['error']}")
    if (parts.uplink is not None) != (unborn.spec.uplink is not None):
        raise IsolationIncomplete("a machine's way out is not what was ordered")
    try:
        parts.agent_pidfd = os.pidfd_open(pid)
        parts.pid_namespace = os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        parts.mount_namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        parts.namespaces = check.namespaces_of(pid)
        walls = check.check_confinement(
            pid,
            filters=nursery.filters,
            root=nursery.root,
            cgroup=parts.cgroup,
            uplink=unborn.spec.uplink is not None,
        )
    except OSError as exc:
        raise MachineFailed(f"the new machine died while it was looked at: {exc}") from exc
    parts.filters = nursery.filters - ("signal_filter" not in walls)
    walls += _limit_walls(nursery)
    missing = sorted(set(nursery.options.require) - set(walls))
    if missing:
        raise IsolationIncomplete(f"required walls are missing on this machine: {', '.join(missing)}")
    machine = ProcessMachine(unborn.id, unborn.spec, parts, agent_pid=pid)
    machine.walls = tuple(sorted(walls))
    parts.birth.send(b"go")
    return machine


def _limit_walls(nursery: Nursery) -> tuple[Wall, ...]:
    """Limits in force besides what was checked: control groups', and the process and disk limits in any case."""
    return tuple({*nursery.cgroups.walls, "process_limit", "disk_limit"})


def receive_with_pid(sock: socket.socket, if_dead: str) -> tuple[dict[str, Any], int]:
    """One JSON packet and the pid of its sender.  Raises: MachineFailed(if_dead) at the end, or for no such packet."""
    message, pid, _ = _receive(sock, if_dead)
    return message, pid


def _receive(sock: socket.socket, if_dead: str, *, max_fds: int = 0) -> tuple[dict[str, Any], int, list[int]]:
    """The same with the descriptors that came along; without room for any the kernel hands none over."""
    space = socket.CMSG_SPACE(struct.calcsize("3i"))
    if max_fds:
        space += socket.CMSG_SPACE(max_fds * struct.calcsize("i"))
    try:
        data, ancillary, _, _ = sock.recvmsg(MAX_REPORT_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    except OSError as exc:
        raise MachineFailed(f"{if_dead}: {exc}") from exc
    fds, pid = array.array("i"), 0
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            pid = int(struct.unpack("3i", content[: struct.calcsize("3i")])[0])
        elif level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    try:
        return _decode(data, pid, if_dead), pid, list(fds)
    except MachineFailed:
        for fd in fds:
            os.close(fd)
        raise


def _decode(data: bytes, pid: int, if_dead: str) -> dict[str, Any]:
    if not data:
        raise MachineFailed(if_dead)
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise MachineFailed(f"a new machine sent what is no report: {exc}") from exc
    if not pid or not isinstance(message, dict):
        raise MachineFailed("a new machine reported without credentials")
    return message
