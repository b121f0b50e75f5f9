"""One machine of the microvm engine: a VM, its disk, its conversation with the first process in it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from podflare.engines.base import Death, FileMerge, Limits, Machine, MachineSpec, UplinkEnds, Usage, Wall
from podflare.engines.linux.cgroups import Cgroup
from podflare.engines.linux.ending import END_TIMEOUT_S, remove_tree
from podflare.engines.microvm.control import Control
from podflare.engines.microvm.landing import Landing
from podflare.engines.microvm.origins import Origin
from podflare.engines.microvm.vmm import Shape, Vm
from podflare.errors import MachineFailed, PodflareError
from podflare.wire.api import Diff

USAGE_TIMEOUT_S = 2.0
LIMITS_TIMEOUT_S = 10.0
VMM_BYTES = 320 << 20
"""What a VMM may use besides its VM's memory: its program, translated code, threads."""
VMM_PROCESSES = 256
"""Threads of a VMM."""
MAX_COUNT = 1 << 40
KEPT_CONSOLES = 20


class MicrovmMachine:
    """See engines.base.Machine for the contract."""

    def __init__(
        self,
        machine_id: str,
        spec: MachineSpec,
        vm: Vm,
        origin: Origin,
        directory: Path,
        cgroup: Cgroup | None,
        landing: Landing | None = None,
    ) -> None:
        """Args: landing: with a way out in `spec`; the machine's from here on."""
        self.id = machine_id
        self.spec = spec
        self.walls: tuple[Wall, ...] = ()
        self.fork_report: dict[str, Any] = {}
        self.channel = vm.channel
        self.vm = vm
        self.control = Control(vm.control, stale=True)
        self.root = origin.root
        self.shape: Shape = origin.shape
        self.directory = directory
        self.cgroup = cgroup
        self.uplink: UplinkEnds | None = None
        self._landing = landing
        self.pause_s = 0.0
        """How long it stood still when it was last forked or saved."""
        self.on_close: Callable[[MicrovmMachine], Coroutine[Any, Any, None]] | None = None
        self.on_fork: Callable[[MicrovmMachine, int, bool, float], Any] | None = None
        self.on_snapshot: Callable[[MicrovmMachine, str, Mapping[str, Any], float], Any] | None = None
        self.on_diff: Callable[..., Any] | None = None
        self.on_merge: Callable[[MicrovmMachine, MicrovmMachine, tuple[str, ...], float], Any] | None = None
        self._death: asyncio.Future[Death] = asyncio.get_running_loop().create_future()
        self._closing: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None

    @property
    def disk(self) -> Path:
        return self.directory / "disk"

    @property
    def is_closed(self) -> bool:
        """Whether `aclose` has begun."""
        return self._closing is not None

    async def open_uplink(self) -> None:
        """Have `uplink`, where the machine has one.  Raises: EgressUnavailable, DeadlineExceeded."""
        if self._landing is not None and self.vm.frames is not None:
            tun, listener = await self._landing.ends()
            self.uplink = UplinkEnds(tun, listener, self.vm.frames.fileno())

    def watch(self) -> None:
        """Start to watch for the VM's end."""
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        how = await self.vm.wait_dead()
        if self._death.done():
            return
        last = self.vm.console.last_line
        kept = await asyncio.get_running_loop().run_in_executor(None, self._keep_console, self.vm.console.text)
        reason = f"its virtual machine ended ({how})"
        if last:
            reason += f"; the last line of its console: {last!r}"
        if kept is not None:
            reason += f"; all of it: {kept}"
        self._declare_dead(Death(reason, out_of_memory=bool(self.cgroup and self.cgroup.oom_kills())))

    def _keep_console(self, text: str) -> Path | None:
        folder = self.directory.parent.parent / "consoles"
        if not text:
            return None
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            for old in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)[: 1 - KEPT_CONSOLES]:
                old.unlink(missing_ok=True)
            path = folder / f"{self.id}.log"
            path.write_text(text)
        except OSError:
            return None
        return path

    def _declare_dead(self, death: Death) -> None:
        if not self._death.done():
            self._death.set_result(death)

    async def lose(self, why: str) -> None:
        """End a machine with which nothing can be done any more, for this reason."""
        self._declare_dead(Death(why))
        await self.vm.aclose()

    def check_alive(self) -> None:
        """Raises: MachineFailed if it is gone."""
        if self._death.done():
            raise MachineFailed(f"machine {self.id} is gone: {self._death.result().reason}")

    async def limit_inside(self, limits: Limits) -> None:
        """Have the guest's kernel hold them.  Raises: MachineFailed, DeadlineExceeded."""
        order = {"memory_bytes": limits.memory_bytes, "processes": limits.max_processes}
        await self.control.ask({"limits": order}, timeout_s=LIMITS_TIMEOUT_S)

    async def set_limits(self, limits: Limits) -> None:
        self.check_alive()
        if limits == self.spec.limits:
            return
        if limits.memory_bytes > self.shape.memory_bytes or limits.disk_bytes != self.spec.limits.disk_bytes:
            raise MachineFailed("memory and disk of a virtual machine cannot grow beyond what it was made with")
        try:
            if self.cgroup is not None:
                self.cgroup.set_limits(vmm_limits(limits, self.shape))
            await self.limit_inside(limits)
        except (OSError, PodflareError) as exc:
            raise MachineFailed(f"machine {self.id}: limits could not be set: {exc}") from exc
        self.spec = replace(self.spec, limits=limits)

    async def usage(self, *, detail: bool = False) -> Usage:
        if self._death.done():
            return Usage()
        inside = await self._usage_inside()
        memory, private = await asyncio.get_running_loop().run_in_executor(None, memory_of, self.vm.pid)
        usage = replace(inside, memory_bytes=memory)
        if not detail:
            return usage
        with contextlib.suppress(OSError):
            usage = replace(usage, disk_bytes=self.disk.stat().st_blocks * 512)
        return replace(usage, private_memory_bytes=private)

    async def _usage_inside(self) -> Usage:
        """What the guest's kernel counts.  A guest that lies about it deceives its owner alone."""
        try:
            told = (await self.control.ask({"usage": True}, timeout_s=USAGE_TIMEOUT_S)).get("usage")
        except PodflareError:
            return Usage()
        counts = told if isinstance(told, dict) else {}
        return Usage(processes=_count(counts.get("processes")), oom_kills=_count(counts.get("oom_kills")))

    async def fork(self, count: int, *, reseed: bool, timeout_s: float) -> tuple[Machine, ...]:
        self.check_alive()
        if self.on_fork is None:
            raise MachineFailed(f"machine {self.id} is gone")
        children: tuple[Machine, ...] = await self.on_fork(self, count, reseed, timeout_s)
        return children

    async def snapshot(self, name: str, *, note: Mapping[str, Any] | None = None, timeout_s: float) -> None:
        self.check_alive()
        if self.on_snapshot is None:
            raise MachineFailed(f"machine {self.id} is gone")
        await self.on_snapshot(self, name, note or {}, timeout_s)

    async def diff(self, other: Machine, paths: tuple[str, ...], *, detail: bool, timeout_s: float) -> Diff:
        if self.on_diff is None or not isinstance(other, MicrovmMachine):
            raise MachineFailed(f"machine {other.id} is none of this engine")
        self.check_alive()
        other.check_alive()
        found: Diff = await self.on_diff(self, other, paths, detail=detail, timeout_s=timeout_s)
        return found

    async def merge_files(self, other: Machine, paths: tuple[str, ...], *, timeout_s: float) -> FileMerge:
        if self.on_merge is None or not isinstance(other, MicrovmMachine):
            raise MachineFailed(f"machine {other.id} is none of this engine")
        self.check_alive()
        other.check_alive()
        merge: FileMerge = await self.on_merge(self, other, paths, timeout_s)
        return merge

    async def wait_dead(self) -> Death:
        return await asyncio.shield(self._death)

    async def aclose(self) -> None:
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._declare_dead(Death("the machine was closed"))
        if self._watching is not None:
            self._watching.cancel()
        self.uplink = None
        await end(self.vm, self.cgroup, self.directory, self._landing)
        if self.on_close is not None:
            await self.on_close(self)


async def end(vm: Vm | None, group: Cgroup | None, directory: Path, landing: Landing | None = None) -> None:
    """Take a machine away, however far it has come.  Never raises for what is already gone."""
    loop = asyncio.get_running_loop()
    if vm is not None:
        await vm.aclose()
    if landing is not None:
        landing.close()
    if group is not None:
        await loop.run_in_executor(None, lambda: group.remove(timeout_s=END_TIMEOUT_S))
    await loop.run_in_executor(None, remove_tree, directory)


def vmm_limits(limits: Limits, shape: Shape) -> Limits:
    """For the control group of a VMM, in which the whole VM is."""
    return replace(limits, memory_bytes=shape.memory_bytes + VMM_BYTES, max_processes=VMM_PROCESSES)


def memory_of(pid: int) -> tuple[int, int]:
    """What a process has of memory: its proportional share, and what nobody else has.  Zeros if it is gone."""
    sums = {"Pss:": 0, "Private_Clean:": 0, "Private_Dirty:": 0}
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as rollup:
        for line in rollup:
            name, _, rest = line.partition(" ")
            if name in sums:
                sums[name] = int(rest.split()[0]) * 1024
    return sums["Pss:"], sums["Private_Clean:"] + sums["Private_Dirty:"]


def _count(value: object) -> int:
    return value if type(value) is int and 0 <= value < MAX_COUNT else 0
