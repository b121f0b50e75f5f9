"""What this computer offers to the microvm engine: which VMM, which accelerator, which walls, and why."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from podflare.engines.base import EngineReport, Wall, WallStatus
from podflare.engines.linux import cgroups
from podflare.engines.microvm import accelerator, choice, disks, firecracker
from podflare.engines.microvm.birth import INHERENT_WALLS
from podflare.engines.microvm.choice import AUTO, FIRECRACKER, QEMU
from podflare.engines.microvm.confinement import ALWAYS, AS_ROOT, ENTERED, Confinement
from podflare.engines.microvm.firecracker import Firecracker
from podflare.engines.microvm.images import Images
from podflare.engines.microvm.landing import Landing
from podflare.engines.microvm.qemu import BINARY, Qemu
from podflare.engines.microvm.qemu_command import machine_key
from podflare.engines.microvm.tap import Tap
from podflare.engines.microvm.vmm import Accelerator, Shape, Vmm, VmmStatus
from podflare.errors import DeadlineExceeded, EgressUnavailable, MachineFailed, TemplateFailed, UnknownTemplate
from podflare.wire.api import DEFAULT_TEMPLATE

VERSION_TIMEOUT_S = 10.0
_PROGRAMS = (("setpriv", "util-linux"), ("unshare", "util-linux"), ("sh", "dash"))
"""What starts either VMM, with Debian's packages."""
_TRANSLATED = "instructions are translated (TCG), computing is slow"


@dataclass(frozen=True)
class Found:
    """The VMM to use, if there is one."""

    vmm: Vmm | None
    confinement: Confinement = Confinement(None)  # noqa: RUF009  # frozen
    machine_key: str = ""
    """Names VMM, version, machine and processor: what was saved under another one cannot go on."""
    detail: str = ""
    """Which one it is; or, without one, what is missing and what to do."""
    notes: tuple[str, ...] = ()
    """Of each VMM: found or not, taken or not, and why."""


def find(wish: str = AUTO, firecracker_path: str = "") -> Found:
    """Look for VMMs, try KVM, and take one.  Blocks for some seconds at most.

    Args:
        wish: choice.AUTO or a VMM's name.
        firecracker_path: with AUTO a wish for it; empty: the one on the PATH.
    """
    missing = [f"{name} is missing (Debian: apt install {package})" for name, package in _PROGRAMS if not _has(name)]
    if disks.find_maker() is None:
        missing.append(f"{disks.MAKER} is missing (Debian: apt install e2fsprogs)")
    no_kvm = accelerator.problem_with_kvm()
    programs, one = _firecracker(firecracker_path, missing, no_kvm)
    other = _qemu(missing, no_kvm)
    if firecracker_path and wish == AUTO:
        wish = FIRECRACKER  # who says where it is wants it, and never another one unasked
    statuses = (one, other)
    taken, problem = choice.choose(wish, statuses)
    notes = choice.notes(wish, statuses)
    if taken == FIRECRACKER and programs is not None:
        confinement = Confinement.detect(kvm=True, jailed=True)
        key = _key(FIRECRACKER, programs.version, _processor())
        return Found(Firecracker(programs, confinement), confinement, key, one.detail, notes)
    if taken == QEMU:
        mode = other.accelerator or "tcg"
        confinement = Confinement.detect(kvm=mode == "kvm")
        key = machine_key(other.version, mode, Shape(0, 0))
        if mode == "kvm":
            key = _key(key, _processor())
        return Found(Qemu(shutil.which(BINARY) or BINARY, mode, confinement), confinement, key, other.detail, notes)
    return Found(None, detail=problem, notes=notes)


def _has(program: str) -> bool:
    return shutil.which(program) is not None


def _firecracker(path: str, missing: list[str], no_kvm: str) -> tuple[firecracker.Programs | None, VmmStatus]:
    try:
        programs = firecracker.find(path or firecracker.BINARY)
    except MachineFailed as exc:
        return None, VmmStatus(FIRECRACKER, False, None, detail=str(exc))
    what = f"Firecracker {programs.version} ({programs.firecracker})"
    if no_kvm:
        missing = [*missing, f"it needs KVM: {no_kvm}"]
    if missing:
        return programs, VmmStatus(FIRECRACKER, False, None, programs.version, f"{what}, but {'; '.join(missing)}")
    jailed = "in its jailer's jail" if programs.jailer else "without its jailer, which needs root"
    return programs, VmmStatus(FIRECRACKER, True, "kvm", programs.version, f"{what} with KVM, {jailed}")


def _qemu(missing: list[str], no_kvm: str) -> VmmStatus:
    binary = shutil.which(BINARY)
    if binary is None:
        missing = [f"{BINARY} is missing (Debian: apt install qemu-system-x86)", *missing]
    version = "" if binary is None else _version(binary)
    if binary is not None and not version:
        missing = [f"{binary} does not start", *missing]
    if missing:
        return VmmStatus(QEMU, False, None, version, "; ".join(missing))
    mode: Accelerator = "tcg" if no_kvm else "kvm"
    how = f"{no_kvm}: {_TRANSLATED}" if no_kvm else "with KVM"
    return VmmStatus(QEMU, True, mode, version, f"QEMU {version}, {how}")


def _version(binary: str) -> str:
    try:
        told = subprocess.run(
            [binary, "--version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    words = told.stdout.split("version ", 1)
    return words[1].split()[0] if len(words) == 2 else ""


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What a guest under KVM sees of the processor, and goes on with nowhere else."""
    told: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        told.setdefault(name.strip(), value.strip())
    return "\0".join(told.get(name, "") for name in ("model name", "stepping", "microcode", "flags"))


async def report(images: Images, wish: str, firecracker_path: str) -> EngineReport:
    """For `podflare doctor`."""
    loop = asyncio.get_running_loop()
    found = await loop.run_in_executor(None, find, wish, firecracker_path)
    no_uplink = "" if found.vmm is None else await _why_no_network(found.vmm, found.confinement)
    return await loop.run_in_executor(None, _report, images, found, no_uplink)


async def _why_no_network(vmm: Vmm, confinement: Confinement) -> str:
    """Empty if virtual machines can have a network here: tried by making what one needs."""
    try:
        with contextlib.closing(Landing()) as landing:
            await landing.ends()
        if vmm.wire == "tap":
            with contextlib.closing(Tap(confinement.user_id)) as tap:
                await tap.entrance()
    except (EgressUnavailable, DeadlineExceeded) as exc:
        return str(exc)
    return ""


def _report(images: Images, found: Found, no_uplink: str) -> EngineReport:
    groups = cgroups.detect()
    walls = tuple(_status(wall, found, groups) for wall in _walls())
    problem = "" if found.vmm is not None else found.detail
    if found.vmm is not None:
        try:
            images.get(DEFAULT_TEMPLATE)
        except (UnknownTemplate, TemplateFailed) as exc:
            problem = str(exc)
    return EngineReport(
        "microvm", usable=not problem, walls=walls, problem=problem, no_uplink=no_uplink, notes=found.notes
    )


def _walls() -> tuple[Wall, ...]:
    return (*INHERENT_WALLS, *ALWAYS, *AS_ROOT, "cpu_limit")


def _status(wall: Wall, found: Found, groups: cgroups.Cgroups) -> WallStatus:
    if found.vmm is None:
        return WallStatus(wall, False)
    if wall == "hypervisor":
        return WallStatus(wall, True, found.detail)
    if wall == "cpu_limit":
        return WallStatus(wall, "cpu" in groups.parents, groups.detail)
    if wall in AS_ROOT and os.geteuid() != 0:
        entered = wall in ENTERED and found.vmm.wire == "tap"
        when = "only a root daemon can confine its hypervisors so"
        return WallStatus(wall, False, f"{when}, or where a sandbox has egress" if entered else when)
    return WallStatus(wall, True)
