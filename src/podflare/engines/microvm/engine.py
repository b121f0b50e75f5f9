"""The microvm engine: a virtual machine for each sandbox.  See engines.base.Engine for the contract.

A machine is restored from its template's saved VM; a fork is a running VM saved and restored, with all that runs in it.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from podflare.engines.base import Behaviour, Capability, EngineOptions, EngineReport, Limits, MachineSpec, Snapshot
from podflare.engines.linux import cgroups
from podflare.engines.linux.ending import remove_tree
from podflare.engines.linux.waiting import make_owned, to_the_end
from podflare.engines.microvm import probe, saved
from podflare.engines.microvm.birth import Nursery, bear
from podflare.engines.microvm.clocks import keep_clocks
from podflare.engines.microvm.diff import compare_machines
from podflare.engines.microvm.fork import fork_machine, mark, save
from podflare.engines.microvm.images import Images
from podflare.engines.microvm.machine import MicrovmMachine
from podflare.engines.microvm.merge import MicrovmFileMerge
from podflare.engines.microvm.origins import Origin, Origins, check_same_image, same_file
from podflare.engines.microvm.past import Past
from podflare.engines.microvm.probe import Found
from podflare.engines.microvm.vmm import Shape
from podflare.engines.snapshots import SnapshotStore
from podflare.errors import (
    Conflict,
    DeadlineExceeded,
    IsolationIncomplete,
    MachineFailed,
    PodflareError,
)
from podflare.wire.api import TemplateInfo

OWN_BYTES = 128 << 20
"""Of a VM's memory, for its kernel and first process: what user code may use is its limit."""
LEAST_BYTES = 1 << 30
MOST_CPUS = 4
"""Of a machine that may use all that nobody else wants, where instructions run on the processor itself."""
_GIB = 1 << 30

Made = TypeVar("Made")


def shape_of(limits: Limits, *, cpus: int, network: bool = False) -> Shape:
    """The VM for a machine with these limits; few different ones, for each has to be booted once.

    Args: cpus: of a machine without a limit.
    """
    memory = LEAST_BYTES
    while memory < limits.memory_bytes:
        memory *= 2
    return Shape(memory + OWN_BYTES, cpus if limits.cpus is None else max(1, -int(-limits.cpus // 1)), network)


def disk_bytes_of(limits: Limits) -> int:
    """Whole gibibytes, likewise."""
    return -(-limits.disk_bytes // _GIB) * _GIB


class MicrovmEngine:
    """Makes machines of templates that images were built of.  `start` before `create`."""

    name = "microvm"
    how = ""
    capabilities: Mapping[Capability, str] = {
        "fork": "the whole machine, its memory shared until written to, and its disk",
        "processes cross": "threads, processes, sockets, terminals, timers",
        "generations": "without end",
        "diff": "all files below the paths are listed inside; what was written to since a fork is read",
        "merge": "three-way: files, lines of texts, variables; what both were is read from the saved fork",
        "snapshot": "kept on disk, restored any number of times, by later daemons too; with no network",
        "network": "egress with rules, secrets and a log",
        "templates": "images built from the distribution's packages and wheels",
    }
    behaviour: Mapping[Behaviour, str] = {
        "a full disk": "an error inside; the machine goes on",
        "the computer's disk full": "ends the machine that writes, which says so",
        "system calls": "all that its own kernel allows without privileges: debuggers and user namespaces, too",
        "code against its agent": "may end its own machine; the guard is the hypervisor",
        "processors": "one where instructions are translated, else up to four",
        "usage": "memory, processes, disk; changed files are not counted",
        "report of a fork": "empty: all was taken along",
    }
    pool_size = 2
    """About 50 MB each, and where instructions are translated a third of a second of a processor to make one anew."""
    expected_memory_bytes = 80 << 20
    """An idle one has 45 MB of its own, a few imports double that."""
    rehearsal = "print()"
    """Touches a cell's pages, and has its code translated: else a user's first one can take a fifth of a second."""

    def __init__(self, options: EngineOptions, find: Callable[[], Found] | None = None) -> None:
        """Args: find: takes the place of the look for a VMM as `options` wish for one."""
        self._options = options
        self._find = find or functools.partial(probe.find, options.vmm, options.firecracker)
        self._data = Path(options.data_dir)
        self._images = Images(options.image_dir)
        self._saved = SnapshotStore(options.snapshot_dir, self._data)
        self._nursery: Nursery | None = None
        self._origins: Origins | None = None
        self._machine_key = ""
        self._cpus = 1
        self._machines: set[MicrovmMachine] = set()
        self._past = Past(self._data / "machines", self._data / "roots")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._booting: set[asyncio.Task[Any]] = set()
        self._clocks: asyncio.Task[None] | None = None

    @property
    def templates(self) -> tuple[str, ...]:
        return self._images.names

    @property
    def snapshots(self) -> tuple[str, ...]:
        return self._saved.names

    def describe(self, template: str) -> TemplateInfo:
        return self._images.describe(template)

    async def probe(self) -> EngineReport:
        return await probe.report(self._images, self._options.vmm, self._options.firecracker)

    async def start(self) -> None:
        found = await asyncio.get_running_loop().run_in_executor(None, self._find)
        if found.vmm is None:
            raise IsolationIncomplete(f"the microvm engine cannot work here: {found.detail}")
        self.how = found.detail
        self._loop = asyncio.get_running_loop()
        machines_dir = self._data / "machines"
        # VMMs enter with their own id; names are random, and what is in them is theirs.
        machines_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        self._cpus = 1 if found.vmm.accelerator == "tcg" else min(MOST_CPUS, os.cpu_count() or 1)
        self._machine_key = found.machine_key
        self._origins = Origins(found.vmm, found.machine_key, self._data)
        self._clocks = asyncio.get_running_loop().create_task(keep_clocks(lambda: self._machines))
        self._nursery = Nursery(self._options, machines_dir, found.vmm, found.confinement, cgroups.detect())

    def _ready(self) -> tuple[Nursery, Origins]:
        if self._nursery is None or self._origins is None:
            raise MachineFailed("the microvm engine is not started")
        return self._nursery, self._origins

    # Machines.

    def can_change(self, made: Limits, wanted: Limits) -> bool:
        one, other = (shape_of(limits, cpus=self._cpus) for limits in (made, wanted))
        # Less memory than its own is held inside.
        same = one.cpus == other.cpus and made.disk_bytes == wanted.disk_bytes
        return same and other.memory_bytes <= one.memory_bytes

    async def create(self, spec: MachineSpec, *, timeout_s: float) -> MicrovmMachine:
        [machine] = await self._make(self._bear(spec, timeout_s), timeout_s, "a new virtual machine")
        return machine

    async def restore(self, name: str, *, timeout_s: float) -> MicrovmMachine:
        [machine] = await self._make(self._bear_saved(name, timeout_s), timeout_s, f"snapshot {name!r}")
        return machine

    def describe_snapshot(self, name: str) -> Snapshot:
        return self._saved.get(name).about

    def remove_snapshot(self, name: str) -> None:
        self._saved.remove(name)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._past.snapshot_removed, name)  # this runs in a thread

    async def _make(
        self, making: Coroutine[Any, Any, tuple[MicrovmMachine, ...]], timeout_s: float, what: str
    ) -> tuple[MicrovmMachine, ...]:
        try:
            machines = await make_owned(making, timeout_s=timeout_s, discard=_discard)
        except PodflareError:
            raise
        except TimeoutError as exc:
            hint = (
                "; its template is being booted for the first time, which goes on: try again" if self._booting else ""
            )
            raise DeadlineExceeded(f"{what} was not ready within {timeout_s:g} s{hint}") from exc
        except OSError as exc:
            raise MachineFailed(f"{what} could not be made: {exc}") from exc
        return machines

    async def _bear(self, spec: MachineSpec, timeout_s: float) -> tuple[MicrovmMachine, ...]:
        nursery, origins = self._ready()
        image = await asyncio.get_running_loop().run_in_executor(None, self._images.take, spec.template)
        shape = shape_of(spec.limits, cpus=self._cpus, network=spec.uplink is not None)
        booting = asyncio.get_running_loop().create_task(origins.get(image, shape, disk_bytes_of(spec.limits)))
        self._booting.add(booting)
        booting.add_done_callback(self._booted)
        # Shielded: a boot may take longer than one caller waits, and the next one needs it, too.
        origin = await asyncio.shield(booting)
        return (self._take_in(await bear(nursery, spec, origin, reseed=True, timeout_s=timeout_s)),)

    def _booted(self, task: asyncio.Task[Any]) -> None:
        self._booting.discard(task)
        if not task.cancelled():
            task.exception()  # told to whoever waited; nobody may have

    async def _bear_saved(self, name: str, timeout_s: float) -> tuple[MicrovmMachine, ...]:
        nursery, _ = self._ready()
        kept = await asyncio.get_running_loop().run_in_executor(None, self._saved.get, name)
        origin = saved.origin_of(kept, self._machine_key)
        root = await asyncio.get_running_loop().run_in_executor(None, self._past.hold_root, origin.root)
        origin = replace(origin, root=root)
        moment = await self._past.hold_snapshot(name, origin)
        machine = self._take_in(await bear(nursery, kept.about.spec, origin, reseed=True, timeout_s=timeout_s))
        if moment is not None:
            self._past.kin.goes_on(moment, (machine,))
        return (machine,)

    def _take_in(self, machine: MicrovmMachine) -> MicrovmMachine:
        self._machines.add(machine)
        machine.on_close = self._forget
        machine.on_fork = self._fork
        machine.on_merge = self._merge_files
        machine.on_snapshot = self._snapshot
        machine.on_diff = compare_machines
        machine.watch()
        return machine

    async def _fork(
        self, parent: MicrovmMachine, count: int, reseed: bool, timeout_s: float
    ) -> tuple[MicrovmMachine, ...]:
        async def bear_children() -> tuple[MicrovmMachine, ...]:
            nursery, _ = self._ready()
            with self._past.held() as name:
                folder = self._past.folders.path(name)
                children = await fork_machine(nursery, parent, folder, count, reseed=reseed, timeout_s=timeout_s)
                # Nothing waits from here on, or a cancellation lost the children.
                for child in children:
                    self._take_in(child)
                self._past.born(parent, children, name)
            return children

        return await self._make(bear_children(), timeout_s, "the fork")

    async def _forget(self, machine: MicrovmMachine) -> None:
        self._machines.discard(machine)
        await self._past.gone(machine)

    async def _merge_files(
        self, ours: MicrovmMachine, theirs: MicrovmMachine, paths: tuple[str, ...], timeout_s: float
    ) -> MicrovmFileMerge:
        nursery, origins = self._ready()
        check_same_image(ours.root, theirs.root)

        async def template() -> Origin:
            """What machines are that nothing has happened to."""
            image = await asyncio.get_running_loop().run_in_executor(None, self._images.take, ours.spec.template)
            if not same_file(image.rootfs, ours.root):
                raise Conflict("their template has another image by now: nothing tells which of the two changed a file")
            return await origins.get(image, ours.shape, disk_bytes_of(ours.spec.limits))

        return await MicrovmFileMerge.begin(nursery, self._past, template, ours, theirs, paths, timeout_s)

    async def _snapshot(self, machine: MicrovmMachine, name: str, note: Mapping[str, Any], timeout_s: float) -> None:
        async def keep() -> tuple[MicrovmMachine, ...]:
            loop = asyncio.get_running_loop()
            await mark(machine, timeout_s=timeout_s)
            with self._saved.keeping(name) as keeping:
                origin = saved.begin(keeping, machine.root, machine.shape)
                await save(machine, origin)

                async def publish() -> None:
                    more = saved.more(origin, self._machine_key)
                    await loop.run_in_executor(None, keeping.publish, machine.spec, note, more)
                    self._past.snapshot_taken(name, machine)

                await to_the_end(publish())
            return ()

        await self._make(keep(), timeout_s, f"snapshot {name!r}")

    async def aclose(self) -> None:
        tasks = [*self._booting, *((self._clocks,) if self._clocks is not None else ())]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await _discard(list(self._machines))
        await self._past.aclose()
        self._images.release()
        nursery, self._nursery = self._nursery, None
        if nursery is not None and nursery.cgroups.version:
            nursery.cgroups.remove_instance(self._options.instance)

    @staticmethod
    def reap(data_dir: Path, instance: str) -> None:
        """Remove what a dead daemon's engine left: its VMMs, which the kernel has ended, its machines' directories.

        Called by the host at start, for an instance whose lock is free.  Touches nothing of a living one.
        Raises: OSError if something is still in use; the next start tries again.
        """
        groups = cgroups.detect()
        if groups.version and not groups.remove_instance(instance):
            raise OSError(f"control groups of {instance} are still in use")
        for folder in (data_dir / "machines", data_dir):
            if folder.is_dir():
                for directory in folder.iterdir():
                    if folder != data_dir or directory.name.startswith(("boot-", "roots")):
                        remove_tree(directory)


async def _discard(machines: Sequence[MicrovmMachine]) -> None:
    await asyncio.gather(*(machine.aclose() for machine in machines))
