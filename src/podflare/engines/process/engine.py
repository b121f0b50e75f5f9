"""The process engine: sandboxes from namespaces and kernel fork.  See engines.base.Engine for the contract."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from pathlib import Path

from podflare.engines.base import EngineOptions, EngineReport, Limits, MachineSpec, Wall
from podflare.engines.linux import cgroups, seccomp
from podflare.engines.process import probe
from podflare.engines.process.check import check_confinement
from podflare.engines.process.disk import DiskWatch
from podflare.engines.process.facts import HostFacts, read_facts
from podflare.engines.process.machine import Birth, ProcessMachine, end_parts, receive_birth, remove_tree
from podflare.engines.process.plan import ROOT_FIRST_ID, plan_machine, plan_stage
from podflare.engines.process.zygote import Zygote, wait_readable
from podflare.errors import DeadlineExceeded, IsolationIncomplete, MachineFailed, PodflareError, UnknownTemplate


class ProcessEngine:
    """Makes machines of the embedded `default` template.  `start` before `create`."""

    name = "process"
    templates = ("default",)

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._data = Path(options.data_dir)
        self._machines_dir = self._data / "machines"
        self._facts: HostFacts = read_facts()
        self._cgroups = cgroups.Cgroups(0, {}, "not looked at yet")
        self._filters: tuple[bytes, ...] = ()
        self._zygote: Zygote | None = None
        self._machines: set[ProcessMachine] = set()
        self._disk = DiskWatch(self._machines_dir)

    async def probe(self) -> EngineReport:
        return await probe.report()

    async def start(self) -> None:
        self._filters = seccomp.compile_filters()
        self._cgroups = cgroups.detect()
        self._machines_dir.mkdir(parents=True, exist_ok=True)
        if self._facts.root:
            # The machines' ids must be able to enter; their names are random and their content is theirs.
            self._machines_dir.chmod(0o711)
        self._zygote = await self._start_zygote()
        self._disk.start()

    async def _start_zygote(self) -> Zygote:
        stage_dir = self._data / "stage"
        stage_dir.mkdir(exist_ok=True)
        problem: IsolationIncomplete | None = None
        # Without idmapped mounts (older kernels, some file systems) a root daemon's /usr is read-only, no less walled.
        for map_ids in (True, False) if self._facts.root else (False,):
            zygote = Zygote(self._facts.python, self._data / "bundle")
            plan = plan_stage(
                self._facts, stage_dir=str(stage_dir), machines_dir=str(self._machines_dir), map_ids=map_ids
            )
            try:
                await zygote.start(plan)
                return zygote
            except IsolationIncomplete as exc:
                problem = exc
        assert problem is not None
        raise problem

    async def create(self, spec: MachineSpec, *, timeout_s: float) -> ProcessMachine:
        if spec.template not in self.templates:
            raise UnknownTemplate(f"unknown template {spec.template!r:.80}; known: {', '.join(self.templates)}")
        if self._zygote is None:
            raise MachineFailed("the process engine is not started")
        if not self._zygote.alive:
            self._zygote = await self._start_zygote()
        machine_id = secrets.token_hex(8)
        parts, theirs = self._acquire(machine_id, spec.limits)
        try:
            machine = await asyncio.wait_for(self._bear(machine_id, spec, parts, theirs), timeout_s)
        except BaseException as exc:
            await asyncio.shield(end_parts(parts))
            if isinstance(exc, PodflareError):
                raise
            if isinstance(exc, asyncio.TimeoutError):
                raise DeadlineExceeded(f"no machine was ready within {timeout_s:g} s") from exc
            if isinstance(exc, OSError):
                raise MachineFailed(f"a new machine could not be started: {exc}") from exc
            raise
        self._machines.add(machine)
        self._disk.add(machine)
        machine.on_closed = self._forget
        machine.watch()
        return machine

    def _forget(self, machine: ProcessMachine) -> None:
        self._machines.discard(machine)
        self._disk.discard(machine)

    def _acquire(self, machine_id: str, limits: Limits) -> tuple[Birth, list[socket.socket]]:
        """The host's half of a new machine, and the sockets that go to it.  All or nothing."""
        directory = self._machines_dir / machine_id
        pairs: list[tuple[socket.socket, socket.socket]] = []
        group: cgroups.Cgroup | None = None
        try:
            directory.mkdir(mode=0o700)
            if self._facts.root:
                os.chown(directory, ROOT_FIRST_ID, ROOT_FIRST_ID)
            if self._cgroups.version:
                group = self._cgroups.create(self._options.instance, machine_id, limits)
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
        (channel, _), (control, _), (birth, _) = pairs
        for sock in (channel, control, birth):
            sock.setblocking(False)
        birth.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        return Birth(directory, group, channel, control, birth), [theirs for _, theirs in pairs]

    async def _bear(
        self, machine_id: str, spec: MachineSpec, parts: Birth, theirs: list[socket.socket]
    ) -> ProcessMachine:
        """Order the machine, look at it from outside, let it go, wait for its guest."""
        assert self._zygote is not None
        timeout_s = 30.0  # the caller's deadline is nearer; this bounds each wait by itself
        plan = plan_machine(machine_id, spec, filters=self._filters, cgroup_walls=self._cgroups.walls)
        procs: list[int] = []
        try:
            procs = parts.cgroup.open_procs() if parts.cgroup else []
            parts.pidfd = await self._zygote.spawn(plan, [*(sock.fileno() for sock in theirs), *procs])
        finally:
            for sock in theirs:
                sock.close()
            for fd in procs:
                os.close(fd)
        agent = await receive_birth(parts, timeout_s)
        walls = (
            check_confinement(agent, filters=len(self._filters), root=self._facts.root, cgroup=parts.cgroup)
            + self._limit_walls()
        )
        missing = sorted(set(self._options.require) - set(walls))
        if missing:
            raise IsolationIncomplete(f"required walls are missing on this machine: {', '.join(missing)}")
        parts.birth.send(b"go")
        parts.birth.close()
        await wait_readable(parts.channel, timeout_s, "the guest of the new machine did not start")
        machine = ProcessMachine(machine_id, spec, parts)
        machine.walls = tuple(sorted(walls))
        machine.agent_pid = agent
        return machine

    def _limit_walls(self) -> tuple[Wall, ...]:
        """Limits in force besides those of control groups: the process limit always, by rlimit if need be."""
        return tuple({*self._cgroups.walls, "process_limit", "disk_limit"})

    async def aclose(self) -> None:
        await self._disk.aclose()
        await asyncio.gather(*(machine.aclose() for machine in tuple(self._machines)))
        if self._zygote is not None:
            await self._zygote.aclose()
            self._zygote = None
        if self._cgroups.version:
            self._cgroups.remove_instance(self._options.instance)

    @staticmethod
    def reap(data_dir: Path, instance: str) -> None:
        """Remove what a dead daemon's engine left: its control groups with all in them, its machines' directories.

        Called by the host at start, for an instance whose lock is free.  Touches nothing of a living one.
        """
        groups = cgroups.detect()
        if groups.version:
            groups.remove_instance(instance)
        machines = data_dir / "machines"
        if machines.is_dir():
            for directory in machines.iterdir():
                remove_tree(directory)
