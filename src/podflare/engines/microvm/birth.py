"""From a saved VM to a machine: restored, looked at from outside, made another one than its siblings, limited."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from podflare.engines.base import EngineOptions, MachineSpec, Wall
from podflare.engines.linux.cgroups import Cgroup, Cgroups
from podflare.engines.linux.waiting import to_the_end
from podflare.engines.microvm.clocks import tell_time
from podflare.engines.microvm.confinement import Confinement
from podflare.engines.microvm.control import NO_NETWORK, hold_still, renew
from podflare.engines.microvm.disks import copy_disk
from podflare.engines.microvm.landing import Landing
from podflare.engines.microvm.machine import MicrovmMachine, end, vmm_limits
from podflare.engines.microvm.origins import Origin
from podflare.engines.microvm.vmm import DiskRate, Drives, Vm, Vmm
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

    @property
    def rate(self) -> DiskRate:
        return DiskRate(self.options.disk_bytes_per_s, self.options.disk_operations_per_s)


async def bear(
    nursery: Nursery,
    spec: MachineSpec,
    origin: Origin,
    *,
    reseed: bool,
    timeout_s: float,
    forked: bool = False,
    still: bool = False,
) -> MicrovmMachine:
    """A machine that goes on from `origin`, with Ready unread.

    Args:
        forked: with a way out in `spec`, `origin` has been told of one like it already.
        still: only its first process goes on, to be asked what there is; the guest is not made another one.
    Raises: MachineFailed, IsolationIncomplete, EgressUnavailable, DeadlineExceeded, OSError.  Nothing of it is left.
    If cancelled: nothing of it is left.
    """
    machine_id = secrets.token_hex(8)
    directory = nursery.machines_dir / machine_id
    vm: Vm | None = None
    group: Cgroup | None = None
    landing: Landing | None = None
    try:
        directory.mkdir(mode=0o700)
        if spec.uplink is not None:
            landing = Landing()
        disk = directory / "disk"
        await asyncio.get_running_loop().run_in_executor(None, copy_disk, origin.disk, disk)
        drives = Drives(origin.root, disk, nursery.rate)
        vm = await nursery.vmm.restore(directory, origin.shape, origin.saved, drives)
        if nursery.cgroups.version:
            limits = vmm_limits(spec.limits, origin.shape)
            group = nursery.cgroups.create(nursery.options.instance, machine_id, limits)
            group.move(vm.pid)
        machine = MicrovmMachine(machine_id, spec, vm, origin, directory, group, landing)
        await machine.open_uplink()
        machine.walls = walls_of(nursery, vm)
        if still:
            await hold_still(vm, machine.control, timeout_s=timeout_s)
            return machine
        await vm.resume()
        network = network_order(spec, forked=forked)
        await renew(vm, machine.control, hostname=spec.hostname, reseed=reseed, network=network, timeout_s=timeout_s)
        machine.channel = vm.channel
        await machine.limit_inside(spec.limits)
        await tell_time(machine.control)  # the first orders may have been under way for long
        return machine
    except MachineFailed as exc:
        last = vm.console.last_line if vm is not None else ""
        await to_the_end(end(vm, group, directory, landing))
        raise MachineFailed(f"{exc}; the last line of its console: {last!r}") from exc
    except BaseException:
        await to_the_end(end(vm, group, directory, landing))
        raise


def network_order(spec: MachineSpec, *, forked: bool) -> Mapping[str, Any]:
    """What a restored VM is told of its network (guest/vm/network.py)."""
    if spec.uplink is None:
        return NO_NETWORK
    return {"is": "kept"} if forked else {"is": "new", "uplink": asdict(spec.uplink)}


def walls_of(nursery: Nursery, vm: Vm) -> tuple[Wall, ...]:
    """The walls in force.  Raises: IsolationIncomplete if one is missing that has to be there."""
    entered = vm.frames is not None and nursery.vmm.wire == "tap"
    cpu: tuple[Wall, ...] = ("cpu_limit",) if "cpu" in nursery.cgroups.parents else ()
    walls = {*INHERENT_WALLS, *cpu, *nursery.confinement.verify(vm.pid, entered=entered)}
    missing = sorted(set(nursery.options.require) - walls)
    if missing:
        raise IsolationIncomplete(f"required walls are missing on this machine: {', '.join(missing)}")
    return tuple(sorted(walls))
