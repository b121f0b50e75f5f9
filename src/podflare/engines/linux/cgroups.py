"""Control groups for machines: version 2 where a subtree with the controllers is ours, version 1 where that is mounted.

Kernel docs: admin-guide/cgroup-v2.rst and admin-guide/cgroup-v1/.  Groups are named podflare-<instance>/<machine>
below the daemon's own group, so that its own limits hold for the machines, too.
"""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from podflare.engines.base import Limits, Usage, Wall

PREFIX = "podflare-"
INSTANCE_TIMEOUT_S = 15.0
"""For what is left of a whole daemon life to end: on a busy machine the kernel takes its time."""
CPU_PERIOD_US = 100_000
"""Over which processor time is counted: the kernel's own default."""
_WALLS: dict[str, Wall] = {"memory": "memory_limit", "pids": "process_limit", "cpu": "cpu_limit"}


@dataclass(frozen=True)
class Cgroups:
    """Where groups can be made: controller -> directory.  In version 2 all are the same directory."""

    version: int
    """2, 1, or 0 for none."""
    parents: dict[str, Path]
    detail: str

    @property
    def walls(self) -> tuple[Wall, ...]:
        return tuple(sorted(_WALLS[name] for name in self.parents))

    def create(self, instance: str, machine: str, limits: Limits) -> Cgroup:
        """A group for one machine, limits set.

        Raises: OSError that names the file; nothing is left.
        """
        paths: dict[str, Path] = {}
        try:
            for controller, parent in self.parents.items():
                path = parent / f"{PREFIX}{instance}" / machine
                if path not in paths.values():
                    path.parent.mkdir(exist_ok=True)
                    if self.version == 2:
                        _enable(path.parent, self.parents)
                    path.mkdir()
                paths[controller] = path
            group = Cgroup(self.version, paths)
            group.set_limits(limits)
            return group
        except BaseException:
            Cgroup(self.version, paths).remove(timeout_s=0)
            raise

    def remove_instance(self, instance: str) -> bool:
        """Remove every group of a daemon life, ending what is still in it; False if something would not go."""
        tops = [parent / f"{PREFIX}{instance}" for parent in dict.fromkeys(self.parents.values())]
        below = [entry for top in tops if top.is_dir() for entry in top.iterdir() if entry.is_dir()]
        # All at once: what dies of one machine dies in the groups of all controllers, in its own time.
        Cgroup(self.version, {str(path): path for path in below}).remove(timeout_s=INSTANCE_TIMEOUT_S)
        gone = [_rmdir(top) for top in tops]
        return all(gone)


class Cgroup:
    """The groups of one machine.  Owned by the machine; `remove` is its end."""

    def __init__(self, version: int, paths: dict[str, Path]) -> None:
        self._version = version
        self._paths = paths

    @property
    def directories(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(self._paths.values()))

    def open_procs(self) -> list[int]:
        """Descriptors into which a process writes "0" to join.  The caller closes them."""
        fds: list[int] = []
        try:
            for path in self.directories:
                fds.append(os.open(path / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC))
        except OSError:
            for fd in fds:
                os.close(fd)
            raise
        return fds

    def pids(self) -> set[int]:
        """The processes in it now."""
        return {pid for path in self.directories for pid in _pids(path)}

    def holds(self, pid: int) -> bool:
        """Whether `pid` is in every one of the groups."""
        return all(str(pid) in (path / "cgroup.procs").read_text().split() for path in self.directories)

    def move(self, pid: int) -> None:
        """Put a process into every one of the groups.  Raises: OSError; ProcessLookupError if it is gone."""
        for path in self.directories:
            _write(path / "cgroup.procs", pid)

    def empty(self, spare: int, timeout_s: float) -> bool:
        """End every process in the groups but `spare`; False if something is left after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = self.pids() - {spare}
            if not left or time.monotonic() >= deadline:
                return not left
            _kill(left)
            time.sleep(0.002)  # as in remove

    def set_limits(self, limits: Limits) -> None:
        memory, pids, cpu = (self._paths.get(name) for name in ("memory", "pids", "cpu"))
        if memory and self._version == 2:
            _write(memory / "memory.max", limits.memory_bytes)
            _write(memory / "memory.oom.group", 0)
            _write_if_there(memory / "memory.swap.max", 0)
        elif memory:
            self._set_memory_v1(memory, limits.memory_bytes)
        if pids:
            _write(pids / "pids.max", limits.max_processes)
        if cpu:
            self._set_cpu(cpu, limits)

    def _set_cpu(self, path: Path, limits: Limits) -> None:
        quota = None if limits.cpus is None else max(1000, round(limits.cpus * CPU_PERIOD_US))
        if self._version == 2:
            _write(path / "cpu.weight", limits.cpu_weight)
            if quota is not None:
                (path / "cpu.max").write_text(f"{quota} {CPU_PERIOD_US}\n")
            return
        _write(path / "cpu.shares", max(2, limits.cpu_weight * 1024 // 100))
        if quota is not None:
            _write(path / "cpu.cfs_period_us", CPU_PERIOD_US)
            _write(path / "cpu.cfs_quota_us", quota)

    def _set_memory_v1(self, path: Path, limit: int) -> None:
        # memory.memsw must never be below memory.limit: raise it first, lower it last.
        both = (path / "memory.memsw.limit_in_bytes", path / "memory.limit_in_bytes")
        growing = limit > int((path / "memory.limit_in_bytes").read_text())
        for file in both if growing else reversed(both):
            _write_if_there(file, limit)

    def usage(self) -> Usage:
        memory, pids = self._paths.get("memory"), self._paths.get("pids")
        name = "memory.current" if self._version == 2 else "memory.usage_in_bytes"
        return Usage(
            memory_bytes=_number(memory / name) if memory else 0,
            processes=_number(pids / "pids.current") if pids else 0,
            oom_kills=self.oom_kills(),
        )

    def oom_kills(self) -> int:
        memory = self._paths.get("memory")
        if not memory:
            return 0
        file = memory / ("memory.events" if self._version == 2 else "memory.oom_control")
        try:
            lines = file.read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)

    def remove(self, *, timeout_s: float) -> bool:
        """End what is left in the groups and remove them; False if something would not go within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        left = list(self.directories)
        while True:
            left = [path for path in left if not _rmdir(path)]
            if not left or time.monotonic() >= deadline:
                return not left
            _kill(pid for path in left for pid in _pids(path))
            time.sleep(0.002)  # the kernel has no event for "the last task has left" that both versions share


def detect() -> Cgroups:
    """What this process may use: makes and removes a group to be sure."""
    mounts = _mounts()
    own = _own_groups()
    problems: list[str] = []
    for candidate in (_version2(mounts, own, problems), _version1(mounts, own, problems)):
        if candidate is not None:
            return candidate
    return Cgroups(0, {}, "; ".join(problems) or "no cgroup file system is mounted")


def _version2(mounts: list[tuple[str, str, str]], own: dict[str, str], problems: list[str]) -> Cgroups | None:
    for path, kind, _ in mounts:
        if kind != "cgroup2":
            continue
        base = Path(path)
        for parent in dict.fromkeys((base / own.get("", "/").lstrip("/"), base)):
            try:
                offered = set((parent / "cgroup.controllers").read_text().split()) & set(_WALLS)
                if "memory" not in offered or "pids" not in offered:
                    problems.append(f"cgroup v2 at {parent} offers no memory and pids controllers")
                    continue
                _enable(parent, offered)
                _try_group(parent)
                return Cgroups(2, dict.fromkeys(sorted(offered), parent), f"cgroup v2 at {parent}")
            except OSError as exc:
                problems.append(f"cgroup v2: {exc.strerror} at {exc.filename}")
    return None


def _version1(mounts: list[tuple[str, str, str]], own: dict[str, str], problems: list[str]) -> Cgroups | None:
    parents: dict[str, Path] = {}
    for path, kind, options in mounts:
        for controller in _WALLS:
            if kind != "cgroup" or controller not in options.split(","):
                continue
            base = Path(path)
            inside = base / own.get(controller, "/").lstrip("/")
            parent = inside if inside.is_dir() else base
            try:
                _try_group(parent)
                parents[controller] = parent
            except OSError as exc:
                problems.append(f"cgroup v1 {controller}: {exc.strerror} at {parent}")
    return Cgroups(1, parents, "cgroup v1: " + ", ".join(sorted(parents))) if parents else None


def _try_group(parent: Path) -> None:
    # A name of its own for each look: a daemon reaps in a thread while its engine starts.
    probe = parent / f"{PREFIX}probe-{secrets.token_hex(6)}"
    probe.mkdir()
    probe.rmdir()


def _enable(directory: Path, controllers: Iterable[str]) -> None:
    file = directory / "cgroup.subtree_control"
    missing = set(controllers) - set(file.read_text().split())
    if missing:
        file.write_text(" ".join(f"+{name}" for name in sorted(missing)))


def _mounts() -> list[tuple[str, str, str]]:
    """(mount point, type, options) of every cgroup file system."""
    rows = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [(row[1], row[2], row[3]) for row in rows if row[2] in ("cgroup", "cgroup2")]


def _own_groups() -> dict[str, str]:
    """Controller -> path of this process's group; "" for version 2 (proc_pid_cgroup(5))."""
    groups: dict[str, str] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            groups[controller] = path
    return groups


def _pids(path: Path) -> list[int]:
    try:
        return [pid for word in (path / "cgroup.procs").read_text().split() if (pid := int(word)) > 0]
    except OSError:
        return []


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _rmdir(path: Path) -> bool:
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _write(path: Path, value: int) -> None:
    path.write_text(f"{value}\n")


def _write_if_there(path: Path, value: int) -> None:
    if path.exists():
        _write(path, value)
