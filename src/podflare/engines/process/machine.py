"""One machine of the process engine, from birth to removal."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from podflare.engines.base import Death, FileMerge, Limits, Machine, MachineSpec, UplinkEnds, Usage, Wall
from podflare.engines.linux.cgroups import Cgroup
from podflare.engines.linux.ending import END_TIMEOUT_S, end_process
from podflare.engines.linux.waiting import wait_readable
from podflare.engines.process.family import Family
from podflare.engines.process.footprint import add_detail, processes_below
from podflare.errors import MachineFailed, NotBuilt, PodflareError
from podflare.wire.api import Diff


@dataclass
class Parts:
    """What a machine is made of on the host's side; ended as a whole (`end_parts`)."""

    family: Family
    directory: Path
    cgroup: Cgroup | None
    channel: socket.socket
    birth: socket.socket
    line: socket.socket
    """Fork orders to the machine's REPL, and a forked REPL's first words."""
    agent_pidfd: int = -1
    pid_namespace: int = -1
    mount_namespace: int = -1
    layers: tuple[str, ...] = ()
    namespaces: dict[str, str] = field(default_factory=dict)
    filters: int = 0
    """Seccomp programs that its agent is under."""
    uplink: UplinkEnds | None = None

    def release(self) -> None:
        """Close the descriptors; the guest takes the end of its channel as the end."""
        for sock in (self.channel, self.birth, self.line):
            sock.close()
        for fd in (self.pid_namespace, self.mount_namespace):
            if fd >= 0:
                os.close(fd)
        self.pid_namespace = self.mount_namespace = -1
        uplink, self.uplink = self.uplink, None
        if uplink is not None:
            os.close(uplink.packets)
            os.close(uplink.listener)


NO_SNAPSHOTS = "the process engine cannot keep a running sandbox on disk; the microvm engine can"

Forker = Callable[["ProcessMachine", int, bool, float], Any]


class ProcessMachine:
    """A sandbox's processes below its agent.  See engines.base.Machine for the contract."""

    def __init__(self, machine_id: str, spec: MachineSpec, parts: Parts, *, agent_pid: int) -> None:
        self.id = machine_id
        self.spec = spec
        self.walls: tuple[Wall, ...] = ()
        self.channel = parts.channel
        self.agent_pid = agent_pid
        self.fork_report: dict[str, Any] = {}
        self.parts = parts
        self.parent: ProcessMachine | None = None
        self.nested: set[ProcessMachine] = set()
        """Machines forked from this one that are not removed yet: their PID namespaces lie in this one's."""
        self.depth = 0
        self.fork_orders = 0
        self.on_close: Callable[[ProcessMachine], Any] | None = None
        self.on_fork: Forker | None = None
        self.on_diff: Callable[..., Any] | None = None
        self.on_merge: Callable[..., Any] | None = None
        self._death: asyncio.Future[Death] = asyncio.get_running_loop().create_future()
        self._closing: asyncio.Task[None] | None = None
        self._watching = False

    def watch(self) -> None:
        """Start to watch for the agent's end.  Precondition: the machine has been let go."""
        asyncio.get_running_loop().add_reader(self.parts.agent_pidfd, self._on_end)
        self._watching = True

    def _on_end(self) -> None:
        self.unwatch()
        reason = "the sandbox's first process ended"
        out_of_memory = bool(self.parts.cgroup and self.parts.cgroup.oom_kills())
        self.declare_dead(Death(reason, out_of_memory=out_of_memory))

    def unwatch(self) -> None:
        """Stop watching.  Idempotent."""
        if self._watching:
            self._watching = False
            asyncio.get_running_loop().remove_reader(self.parts.agent_pidfd)

    def declare_dead(self, death: Death) -> None:
        """Record why the machine is gone; the first reason stays."""
        if not self._death.done():
            self._death.set_result(death)

    @property
    def uplink(self) -> UplinkEnds | None:
        return self.parts.uplink

    @property
    def is_closed(self) -> bool:
        """Whether `aclose` has begun."""
        return self._closing is not None

    @property
    def directory(self) -> Path:
        return self.parts.directory

    async def set_limits(self, limits: Limits) -> None:
        if self._death.done():
            raise MachineFailed(f"machine {self.id} is gone")
        if limits == self.spec.limits:
            return
        try:
            if self.parts.cgroup is None:
                raise MachineFailed("limits can only be changed where control groups are available")
            self.parts.cgroup.set_limits(limits)
        except OSError as exc:
            raise MachineFailed(f"machine {self.id}: limits could not be set: {exc}") from exc
        self.spec = replace(self.spec, limits=limits)

    async def usage(self, *, detail: bool = False) -> Usage:
        coarse = self.parts.cgroup.usage() if self.parts.cgroup else Usage()
        if not detail or self._death.done():
            return coarse
        return await asyncio.get_running_loop().run_in_executor(None, self._look_closely, coarse)

    def _look_closely(self, coarse: Usage) -> Usage:
        return add_detail(coarse, self.processes(), self.directory)

    def processes(self) -> Iterable[int]:
        """Pids of what runs in it now."""
        if self.parts.cgroup is not None:
            return self.parts.cgroup.pids()
        eldest = self  # a forked REPL is below the agent of the machine that it was forked in
        while eldest.parent is not None:
            eldest = eldest.parent
        return processes_below(eldest.agent_pid, self.parts.namespaces["pid"])

    async def fork(self, count: int, *, reseed: bool, timeout_s: float) -> tuple[Machine, ...]:
        if self.on_fork is None or self._death.done():
            raise MachineFailed(f"machine {self.id} is gone")
        children: tuple[Machine, ...] = await self.on_fork(self, count, reseed, timeout_s)
        return children

    async def diff(self, other: Machine, paths: tuple[str, ...], *, detail: bool, timeout_s: float) -> Diff:
        if self.on_diff is None or not isinstance(other, ProcessMachine):
            raise MachineFailed(f"machine {other.id} is none of this engine")
        found: Diff = await self.on_diff(self, other, paths, detail=detail, timeout_s=timeout_s)
        return found

    async def merge_files(self, other: Machine, paths: tuple[str, ...], *, timeout_s: float) -> FileMerge:
        if self.on_merge is None or not isinstance(other, ProcessMachine):
            raise MachineFailed(f"machine {other.id} is none of this engine")
        merging: FileMerge = await self.on_merge(self, other, paths, timeout_s)
        return merging

    async def snapshot(self, name: str, *, note: Mapping[str, Any] | None = None, timeout_s: float) -> None:
        raise NotBuilt(NO_SNAPSHOTS)

    async def wait_dead(self) -> Death:
        return await asyncio.shield(self._death)

    async def aclose(self) -> None:
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self.unwatch()
        self.declare_dead(Death("the machine was closed"))
        if self.on_close is not None:
            await self.on_close(self)


async def empty_machine(parts: Parts, agent_pid: int) -> None:
    """End everything in a machine but its agent, which holds the PID namespace that its forks live in.

    The agent does so itself when its channel ends; here is waited for it, and control groups make sure.
    """
    parts.release()
    if parts.cgroup is not None:
        await asyncio.get_running_loop().run_in_executor(None, parts.cgroup.empty, agent_pid, END_TIMEOUT_S)


async def end_parts(parts: Parts) -> None:
    """End every process of a machine and release all but its files.  Never raises for what is already gone."""
    if parts.agent_pidfd < 0:
        await _give_up_birth(parts.birth)
    parts.release()
    pidfd, parts.agent_pidfd = parts.agent_pidfd, -1
    if pidfd >= 0:
        await end_process(pidfd)
    parts.family.members -= 1
    if parts.family.members <= 0:
        await parts.family.aclose()
    if parts.cgroup is not None:
        group = parts.cgroup
        await asyncio.get_running_loop().run_in_executor(None, lambda: group.remove(timeout_s=END_TIMEOUT_S))


async def _give_up_birth(birth: socket.socket) -> None:
    """Wait until nobody is at the other end of a birth socket: an agent whose pid is not known yet, or its maker.

    An agent that finds the end of the socket instead of "go" exits; until then it still makes directories.
    """
    deadline = time.monotonic() + END_TIMEOUT_S
    try:
        birth.shutdown(socket.SHUT_WR)
        while time.monotonic() < deadline:
            await wait_readable(birth, END_TIMEOUT_S, "a machine that was given up did not end")
            if not birth.recv(4096):
                return
    except (OSError, PodflareError):
        return  # closed, or it hangs in the kernel: then its directory stays until the daemon's next start
