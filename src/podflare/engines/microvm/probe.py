"""What this computer offers to the microvm engine: which VMM, which accelerator, which walls, and why."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from podflare.engines.base import EngineReport, Wall, WallStatus
from podflare.engines.linux import cgroups
from podflare.engines.microvm import accelerator, disks
from podflare.engines.microvm.birth import INHERENT_WALLS
from podflare.engines.microvm.confinement import ALWAYS, AS_ROOT, Confinement
from podflare.engines.microvm.images import Images
from podflare.engines.microvm.qemu import BINARY, Qemu
from podflare.engines.microvm.qemu_command import machine_key
from podflare.engines.microvm.vmm import Shape, Vmm, VmmStatus
from podflare.errors import TemplateFailed, UnknownTemplate
from podflare.wire.api import DEFAULT_TEMPLATE

VERSION_TIMEOUT_S = 10.0
NO_UPLINK = "machines of the microvm engine have no network yet; those of the process engine can"
_PROGRAMS = (
    (BINARY, "apt install qemu-system-x86"),
    ("setpriv", "apt install util-linux"),
    ("unshare", "apt install util-linux"),
)


@dataclass(frozen=True)
class Found:
    """The VMM to use, if there is one."""

    vmm: Vmm | None
    status: VmmStatus
    confinement: Confinement
    machine_key: str = ""


def find() -> Found:
    """Look for a VMM and try it.  Blocks for some seconds at most."""
    missing = [f"{name} is missing (Debian: {remedy})" for name, remedy in _PROGRAMS if shutil.which(name) is None]
    if disks.find_maker() is None:
        missing.append(f"{disks.MAKER} is missing (Debian: apt install e2fsprogs)")
    binary = shutil.which(BINARY)
    if missing or binary is None:
        return Found(None, VmmStatus("qemu", False, None, detail="; ".join(missing)), Confinement(None))
    version = _version(binary)
    if not version:
        return Found(None, VmmStatus("qemu", False, None, detail=f"{binary} does not start"), Confinement(None))
    with tempfile.TemporaryDirectory(prefix="podflare-probe-") as folder:
        chosen, why = accelerator.choose(binary, Path(folder))
    confinement = Confinement.detect(kvm=chosen == "kvm")
    status = VmmStatus("qemu", True, chosen, version, f"QEMU {version}, {why}")
    key = machine_key(version, chosen, Shape(0, 0))
    return Found(Qemu(binary, chosen, confinement), status, confinement, key)


def _version(binary: str) -> str:
    try:
        told = subprocess.run(
            [binary, "--version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    words = told.stdout.split("version ", 1)
    return words[1].split()[0] if len(words) == 2 else ""


def report(images: Images) -> EngineReport:
    """For `podflare doctor`.  Blocks."""
    found = find()
    groups = cgroups.detect()
    walls = tuple(_status(wall, found, groups) for wall in _walls())
    problem = "" if found.vmm is not None else found.status.detail
    if found.vmm is not None:
        try:
            images.get(DEFAULT_TEMPLATE)
        except (UnknownTemplate, TemplateFailed) as exc:
            problem = str(exc)
    return EngineReport("microvm", usable=not problem, walls=walls, problem=problem, no_uplink=NO_UPLINK)


def _walls() -> tuple[Wall, ...]:
    return (*INHERENT_WALLS, *ALWAYS, *AS_ROOT, "cpu_limit")


def _status(wall: Wall, found: Found, groups: cgroups.Cgroups) -> WallStatus:
    if found.vmm is None:
        return WallStatus(wall, False)
    if wall == "hypervisor":
        return WallStatus(wall, True, found.status.detail)
    if wall == "cpu_limit":
        return WallStatus(wall, "cpu" in groups.parents, groups.detail)
    if wall in AS_ROOT and os.geteuid() != 0:
        return WallStatus(wall, False, "only a root daemon can confine its hypervisors so")
    return WallStatus(wall, True)
