"""The process engine: sandboxes from namespaces and kernel fork.  See engines.base.Engine for the contract."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from pathlib import Path

from podflare.engines.base import Behaviour, Capability, EngineOptions, EngineReport, Limits, MachineSpec, Snapshot
from podflare.engines.kinship import Kinship
from podflare.engines.linux import cgroups, seccomp
from podflare.engines.linux.ending import remove_tree
from podflare.engines.linux.waiting import make_owned, run_to_end, wait_readable
from podflare.engines.process import carry, probe
from podflare.engines.process.birth import (
    STEP_TIMEOUT_S,
    Nursery,
    Unborn,
    give_up,
    let_mount,
    prepare,
    receive_confined,
    send_order,
)
from podflare.engines.process.diff import compare_machines
from podflare.engines.process.disk import DiskWatch
from podflare.engines.process.facts import NO_TUNNELS, HostFacts, read_facts
from podflare.engines.process.fork import fork_machine
from podflare.engines.process.layers import Layers, take_away
from podflare.engines.process.machine import NO_SNAPSHOTS, ProcessMachine, empty_machine
from podflare.engines.process.merge import ProcessFileMerge
from podflare.engines.process.plan import plan_machine
from podflare.engines.process.templates import Zygotes
from podflare.errors import (
    Conflict,
    DeadlineExceeded,
    EgressUnavailable,
    MachineFailed,
    NotBuilt,
    PodflareError,
)
from podflare.wire.api import TemplateInfo

MAX_DEPTH = 24
"""Generations of forks: each lies in a PID namespace below its parent's, and the kernel stops at 32 levels."""


def _hostname() -> str:
    return f"fork-{secrets.token_hex(4)}"


class ProcessEngine:
    """Makes machines of the embedded `default` template and of those that were built.  `start` before `create`."""

    name = "process"
    how = ""
    capabilities: Mapping[Capability, str] = {
        "fork": "the memory of the Python process, copied on write, and all files",
        "generations": "without end; every 24th copies memory",
        "diff": "by layers: what nobody touched is not looked at",
        "merge": "three-way: files, lines of texts, variables",
        "network": "egress with rules, secrets and a log",
        "templates": "built on this computer from wheels",
    }
    behaviour: Mapping[Behaviour, str] = {
        "a full disk": "ends the sandbox, which says so",
        "the computer's disk full": "an error inside",
        "system calls": "an allow-list",
        "code against its agent": "refused",
        "processors": "all, shared out by weight",
        "usage": "memory, processes, changed files, disk",
        "report of a fork": "names the threads, processes and connections that stayed behind",
    }
    pool_size = 4
    """About 15 MB each."""
    expected_memory_bytes = 32 << 20
    """An idle one has 10 MB, a few imports triple that."""
    rehearsal = ""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._data = Path(options.data_dir)
        self._machines_dir = self._data / "machines"
        self._facts: HostFacts = read_facts()
        self._filters: tuple[bytes, ...] = ()
        self._nursery: Nursery | None = None
        self._zygotes = Zygotes(self._facts, self._data, self._machines_dir, options.template_dir)
        self._machines: set[ProcessMachine] = set()
        self._layers = Layers(self._machines_dir)
        self._kin = Kinship(self._layers)
        self._disk = DiskWatch(self._machines_dir)

    @property
    def templates(self) -> tuple[str, ...]:
        return self._zygotes.names

    def describe(self, template: str) -> TemplateInfo:
        return self._zygotes.describe(template)

    async def probe(self) -> EngineReport:
        return await probe.report()

    async def start(self) -> None:
        self._filters = seccomp.compile_filters()
        self._machines_dir.mkdir(parents=True, exist_ok=True)
        if self._facts.root:
            # The machines' ids must be able to enter; their names are random and their content is theirs.
            self._machines_dir.chmod(0o711)
        self._nursery = Nursery(
            self._options, self._machines_dir, cgroups.detect(), self._facts.root, len(self._filters)
        )
        await self._zygotes.start(self._filters)
        self._disk.start()

    def can_change(self, made: Limits, wanted: Limits) -> bool:
        # The rlimits that hold without control groups cannot be raised.
        return made == wanted or bool(self._ready().cgroups.version)

    async def create(self, spec: MachineSpec, *, timeout_s: float) -> ProcessMachine:
        try:
            machine = await make_owned(self._bear(spec), timeout_s=timeout_s, discard=self._end)
        except PodflareError:
            raise
        except TimeoutError as exc:
            raise DeadlineExceeded(f"no machine was ready within {timeout_s:g} s") from exc
        except OSError as exc:
            raise MachineFailed(f"a new machine could not be started: {exc}") from exc
        self._take_in(machine)
        return machine

    @property
    def snapshots(self) -> tuple[str, ...]:
        return ()

    def describe_snapshot(self, name: str) -> Snapshot:
        raise NotBuilt(NO_SNAPSHOTS)

    async def restore(self, name: str, *, timeout_s: float) -> ProcessMachine:
        raise NotBuilt(NO_SNAPSHOTS)

    def remove_snapshot(self, name: str) -> None:
        raise NotBuilt(NO_SNAPSHOTS)

    async def _bear(self, spec: MachineSpec) -> ProcessMachine:
        """Order the machine, look at it from outside, let it go, wait for its guest."""
        nursery = self._ready()
        if spec.uplink is not None and not self._facts.tunnels:
            raise EgressUnavailable(NO_TUNNELS)
        family = await (await self._zygotes.get(spec.template)).spawn()
        unborn: Unborn | None = None
        try:
            unborn = prepare(nursery, spec, family)
            plan = plan_machine(unborn.id, spec, cgroup_walls=nursery.cgroups.walls)
            send_order([unborn], [plan], family, below=None)
            let_mount(unborn)
            machine = await receive_confined(nursery, unborn)
            machine.parts.birth.close()
            await wait_readable(machine.channel, STEP_TIMEOUT_S, "the guest of the new machine did not start")
            return machine
        except BaseException:
            await run_to_end(give_up(unborn, self._layers) if unborn is not None else family.aclose())
            raise

    def _ready(self) -> Nursery:
        if self._nursery is None:
            raise MachineFailed("the process engine is not started")
        return self._nursery

    async def _end(self, *machines: ProcessMachine) -> None:
        """Take away machines that were made and not handed out."""
        for machine in machines:
            await take_away(machine.parts, self._layers)

    def _take_in(self, machine: ProcessMachine) -> None:
        self._machines.add(machine)
        self._disk.add(machine)
        machine.on_close = self._remove
        machine.on_fork = self._fork
        machine.on_diff = compare_machines
        machine.on_merge = self._merge_files
        machine.watch()

    async def _fork(
        self, parent: ProcessMachine, count: int, reseed: bool, timeout_s: float
    ) -> tuple[ProcessMachine, ...]:
        nursery = self._ready()
        try:
            return await make_owned(
                self._bear_children(nursery, parent, count, reseed=reseed, timeout_s=timeout_s),
                timeout_s=timeout_s,
                discard=lambda made: self._discard(*made),
            )
        except PodflareError:
            raise
        except TimeoutError as exc:
            raise DeadlineExceeded(f"the fork was not ready within {timeout_s:g} s") from exc
        except OSError as exc:
            raise MachineFailed(f"the sandbox could not be forked: {exc}") from exc

    async def _bear_children(
        self, nursery: Nursery, parent: ProcessMachine, count: int, *, reseed: bool, timeout_s: float
    ) -> tuple[ProcessMachine, ...]:
        if parent.depth < MAX_DEPTH:
            return await self._bear_nested(nursery, parent, count, reseed=reseed, timeout_s=timeout_s)
        if not carry.SUPPORTED:
            raise Conflict(
                f"this sandbox is a fork of the {MAX_DEPTH}th generation, the deepest that the kernel's nested "
                "PID namespaces allow on this kind of processor; save its state to files and go on in a new sandbox"
            )
        reseed_copy = reseed and count == 1
        copy = await carry.carry_machine(
            nursery, self._layers, parent, _hostname(), reseed=reseed_copy, timeout_s=timeout_s
        )
        self._take_in(copy)
        self._kin.born(parent, (copy,), copy.parts.layers)
        if count == 1:
            return (copy,)
        # Copied once, forked n times: the children share the copy's memory.
        children: tuple[ProcessMachine, ...] = ()
        try:
            children = await self._bear_nested(nursery, copy, count, reseed=reseed, timeout_s=timeout_s)
            await copy.aclose()
        except BaseException:
            await run_to_end(self._discard(*children, copy))
            raise
        for child in children:
            child.fork_report = copy.fork_report
        return children

    async def _bear_nested(
        self, nursery: Nursery, parent: ProcessMachine, count: int, *, reseed: bool, timeout_s: float
    ) -> tuple[ProcessMachine, ...]:
        hostnames = [_hostname() for _ in range(count)]
        children = await fork_machine(nursery, self._layers, parent, hostnames, reseed=reseed, timeout_s=timeout_s)
        for child in children:
            child.parent, child.depth = parent, parent.depth + 1
            parent.nested.add(child)
            self._take_in(child)
        self._kin.born(parent, children, children[0].parts.layers)
        return tuple(children)

    async def _discard(self, *machines: ProcessMachine) -> None:
        for machine in machines:
            await machine.aclose()

    async def _merge_files(
        self, ours: ProcessMachine, theirs: ProcessMachine, paths: tuple[str, ...], timeout_s: float
    ) -> ProcessFileMerge:
        nursery = self._ready()
        return await ProcessFileMerge.begin(nursery, self._layers, self._kin, ours, theirs, paths, timeout_s)

    async def _remove(self, machine: ProcessMachine) -> None:
        """Closing of a machine: at once if it has no forks, else all but its agent now and that with the last fork."""
        self._disk.discard(machine)
        await self._kin.gone(machine)
        if machine.nested:
            await empty_machine(machine.parts, machine.agent_pid)
            # No fork has this machine's own layer below it, and its agent, which still mounts it, only waits.
            await asyncio.get_running_loop().run_in_executor(None, remove_tree, machine.directory)
            return
        current: ProcessMachine | None = machine
        while current is not None:
            await self._remove_leaf(current)
            parent, current = current.parent, None
            if parent is not None and parent.is_closed and not parent.nested:
                current = parent

    async def _remove_leaf(self, machine: ProcessMachine) -> None:
        if machine not in self._machines:
            return
        self._machines.discard(machine)
        if machine.parent is not None:
            machine.parent.nested.discard(machine)
        await take_away(machine.parts, self._layers)

    async def aclose(self) -> None:
        await self._disk.aclose()
        # Forks first: a machine with forks keeps its agent until they are gone.
        for machine in sorted(self._machines, key=lambda one: -one.depth):
            await machine.aclose()
        await self._zygotes.aclose()
        if self._nursery is not None and self._nursery.cgroups.version:
            self._nursery.cgroups.remove_instance(self._options.instance)

    @staticmethod
    def reap(data_dir: Path, instance: str) -> None:
        """Remove what a dead daemon's engine left: its control groups with all in them, its machines' directories.

        Called by the host at start, for an instance whose lock is free.  Touches nothing of a living one.
        Raises: OSError if something is still in use; the next start tries again.
        """
        groups = cgroups.detect()
        if groups.version and not groups.remove_instance(instance):
            raise OSError(f"control groups of {instance} are still in use")
        machines = data_dir / "machines"
        if machines.is_dir():
            for directory in machines.iterdir():
                remove_tree(directory)
