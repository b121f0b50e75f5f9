"""From a saved VM to a machine: restored, looked at from outside, made another one than its siblings, limited."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from pathlib import Path

from podflare.engines.base import EngineOptions, MachineSpec, Wall
from podflare.engines.linux.cgroups import Cgroup, Cgroups
from podflare.engines.linux.waiting import to_the_end
from podflare.engines.microvm.clocks import tell_time
from podflare.engines.microvm.confinement import Confinement
from podflare.engines.microvm.control import renew
from podflare.engines.microvm.disks import copy_disk
from podflare.engines.microvm.machine import MicrovmMachine, end, vmm_limits
from podflare.engines.microvm.origins import Origin
from podflare.engines.microvm.vmm import Drives, Vm, Vmm
from podflare.errors import IsolationIncomplete, MachineFailed

INHERENT_WALLS: tuple[Wall, ...] = ("hypervisor", "private_root", "memory_limit", "disk_limit", "process_limit")
"""What a VM has because it is one: a kernel, memory, disk and process table of its own, each of a size."""


@dataclass(frozen=True)
class Nursery:
    """What every birth of one engine needs."""

    options: EngineOptions
    machines_dir: Path
    vmm: Vmm
    confinement: Confinement
    cgroups: Cgroups


async def bear(
    nursery: Nursery, spec: MachineSpec, origin: Origin, *, reseed: bool, timeout_s: float
) -> MicrovmMachine:
    """A machine that goes on from `origin`, with Ready unread.

    Raises: MachineFailed, IsolationIncomplete, DeadlineExceeded, OSError.  Then nothing of it is left.
    If cancelled: nothing of it is left.
    """
    machine_id = secrets.token_hex(8)
    directory = nursery.machines_dir / machine_id
    vm: Vm | None = None
    group: Cgroup | None = None
    try:
        directory.mkdir(mode=0o700)
        disk = directory / "disk"
        await asyncio.get_running_loop().run_in_executor(None, copy_disk, origin.disk, disk)
        vm = await nursery.vmm.restore(directory, origin.shape, origin.saved, Drives(origin.root, disk))
        if nursery.cgroups.version:
            limits = vmm_limits(spec.limits, origin.shape)
            group = nursery.cgroups.create(nursery.options.instance, machine_id, limits)
            group.move(vm.pid)
        machine = MicrovmMachine(machine_id, spec, vm, origin, directory, group)
        machine.walls = walls_of(nursery, vm)
        await vm.resume()
        await renew(vm, machine.control, hostname=spec.hostname, reseed=reseed, timeout_s=timeout_s)
        await machine.limit_inside(spec.limits)
        await tell_time(machine.control)  # the first orders may have been under way for long
        return machine
    except MachineFailed as exc:
        last = vm.console.last_line if vm is not None else ""
        await to_the_end(end(vm, group, directory))
        raise MachineFailed(f"{exc}; the last line of its console: {last!r}") from exc
    except BaseException:
        await to_the_end(end(vm, group, directory))
        raise


def walls_of(nursery: Nursery, vm: Vm) -> tuple[Wall, ...]:
    """The walls in force.  Raises: IsolationIncomplete if one is missing that has to be there."""
    cpu: tuple[Wall, ...] = ("cpu_limit",) if "cpu" in nursery.cgroups.parents else ()
    walls = {*INHERENT_WALLS, *cpu, *nursery.confinement.verify(vm.pid)}
    missing = sorted(set(nursery.options.require) - walls)
    if missing:
        raise IsolationIncomplete(f"required walls are missing on this machine: {', '.join(missing)}")
    return tuple(sorted(walls))
