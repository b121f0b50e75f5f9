"""What walls the process engine can put up here: found by building a machine, not by reading version numbers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import get_args

from podflare.engines.base import EngineOptions, EngineReport, Limits, MachineSpec, Wall, WallStatus
from podflare.engines.linux import cgroups
from podflare.engines.process.facts import NO_TUNNELS, read_facts
from podflare.errors import PodflareError

_TIMEOUT_S = 10.0
FOREIGN: tuple[Wall, ...] = ("hypervisor",)
"""Walls of other engines."""

_KERNEL_SWITCHES = (
    ("/proc/sys/user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=15000"),
    ("/proc/sys/kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"),
    (
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "sysctl kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile for the interpreter",
    ),
)


async def report() -> EngineReport:
    """Try the whole road once, in a temporary directory, and tell what came of it."""
    from podflare.engines.process.engine import ProcessEngine  # the engine's own probe() calls this function

    with tempfile.TemporaryDirectory(prefix="podflare-probe-") as folder:
        engine = ProcessEngine(EngineOptions(data_dir=folder, instance=f"probe-{Path(folder).name[-8:]}"))
        try:
            await engine.start()
            spec = MachineSpec("default", Limits(memory_bytes=256 * 2**20, disk_bytes=2**30))
            machine = await engine.create(spec, timeout_s=_TIMEOUT_S)
            walls = machine.walls
            await machine.aclose()
        except PodflareError as exc:
            return EngineReport("process", usable=False, walls=_statuses(()), problem=f"{exc}{_hint()}")
        finally:
            await engine.aclose()
    no_uplink = "" if read_facts().tunnels else NO_TUNNELS
    return EngineReport("process", usable=True, walls=_statuses(walls), no_uplink=no_uplink)


def _statuses(walls: tuple[Wall, ...]) -> tuple[WallStatus, ...]:
    groups = cgroups.detect()
    rows = []
    for wall in get_args(Wall):
        if wall not in FOREIGN:
            rows.append(WallStatus(wall, wall in walls, _detail(wall, wall in walls, groups)))
    return tuple(rows)


def _detail(wall: Wall, available: bool, groups: cgroups.Cgroups) -> str:
    if wall in groups.walls:
        return groups.detail
    details: dict[str, tuple[str, str]] = {
        "separate_uid": ("", "machines run under the daemon's user id: only a root daemon can give them another"),
        "memory_limit": ("", f"per process only, by rlimit; for a limit on the sum: {groups.detail}"),
        "process_limit": ("by rlimit in the machine's own user namespace", groups.detail),
        "cpu_limit": ("", groups.detail),
        "signal_filter": ("", "this kernel's filters are listened to already, or it is older than 5.5"),
        "disk_limit": ("looked at every second; single files exactly, by rlimit", ""),
    }
    return details.get(wall, ("", ""))[0 if available else 1]


def _hint() -> str:
    for path, bad, remedy in _KERNEL_SWITCHES:
        file = Path(path)
        if file.exists() and file.read_text().strip() == bad:
            return f"; {file.name} is {bad} here: {remedy}"
    return ""
