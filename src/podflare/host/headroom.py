"""What the machine has left, and whether that admits more sandboxes.

Counted is what is used now, not what sandboxes may use: most of them are idle, and 500 of 1 GiB fit into 6.
For each new one is asked what its engine says, and a reserve stays free for the growth of those that run and for the
machine.
Limits hold later: memory by each sandbox's own, and the kernel takes sandboxes before the daemon.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from podflare.errors import NoCapacity

MIB = 1024 * 1024
RESERVE_SHARE = 20
"""A twentieth is kept free, but not more than these."""
MOST_MEMORY_RESERVE = 2048 * MIB
MOST_DISK_RESERVE = 1024 * MIB
MOST_FILES_RESERVE = 100_000


@dataclass(frozen=True)
class Amount:
    """Of one resource."""

    left: int
    total: int

    def reserve(self, most: int) -> int:
        return min(most, self.total // RESERVE_SHARE)


class Headroom:
    """Looks at one machine: its memory, the control groups that the daemon is in, its data directory's file system."""

    def __init__(
        self,
        data_dir: Path,
        *,
        memory_reserve: int | None = None,
        disk_reserve: int | None = None,
        proc: Path = Path("/proc"),
    ) -> None:
        """Args: memory_reserve, disk_reserve: bytes to keep free; None for the default, 0 to admit whatever is left."""
        self._data_dir = data_dir
        self._memory_reserve = memory_reserve
        self._disk_reserve = disk_reserve
        self._proc = proc
        self._groups = memory_groups(proc)

    def admit(self, count: int, each_bytes: int, *, starting_bytes: int = 0) -> None:
        """Check that `count` more sandboxes fit.

        Args:
            each_bytes: what one of them may be expected to use (Engine.expected_memory_bytes).
            starting_bytes: the same, of those that are being made, in sum.
        Raises: NoCapacity that says what is short, how much of it is left and which setting decides.
        """
        what = "1 more sandbox" if count == 1 else f"{count} more sandboxes"
        memory = self.memory()
        reserve = self._reserve(self._memory_reserve, memory, MOST_MEMORY_RESERVE)
        if reserve and memory is not None and memory.left - reserve < starting_bytes + count * each_bytes:
            others = f", {starting_bytes // MIB} are for those that are starting" if starting_bytes else ""
            raise NoCapacity(
                f"no memory for {what}: {memory.left // MIB} MiB are left here, {reserve // MIB} are kept free "
                f"(PODFLARE_MEMORY_RESERVE_MIB){others} and each needs {each_bytes // MIB}; close some, or try later"
            )
        disk, files = self.disk()
        reserve = self._reserve(self._disk_reserve, disk, MOST_DISK_RESERVE)
        if reserve and disk.left < reserve:
            raise NoCapacity(
                f"no disk for {what}: {disk.left // MIB} MiB are left where sandboxes write, and {reserve // MIB} "
                "are kept free (PODFLARE_DISK_RESERVE_MIB)"
            )
        if reserve and files is not None and files.left < files.reserve(MOST_FILES_RESERVE):
            raise NoCapacity(f"no disk for {what}: its file system has only {files.left} inodes left")

    def admit_snapshot(self, size_bytes: int) -> None:
        """Check that so much can be kept on disk.  Raises: NoCapacity, as `admit`."""
        disk, _ = self.disk()
        reserve = self._reserve(self._disk_reserve, disk, MOST_DISK_RESERVE)
        if reserve and disk.left - reserve < size_bytes:
            raise NoCapacity(
                f"no disk for a snapshot of about {size_bytes // MIB} MiB: {disk.left // MIB} MiB are left, and "
                f"{reserve // MIB} are kept free (PODFLARE_DISK_RESERVE_MIB)"
            )

    def describe(self) -> dict[str, int | None]:
        """Its part of GET /v1/capacity."""
        memory, (disk, _) = self.memory(), self.disk()
        return {
            "memory_left_bytes": None if memory is None else memory.left,
            "memory_reserve_bytes": self._reserve(self._memory_reserve, memory, MOST_MEMORY_RESERVE),
            "disk_left_bytes": disk.left,
            "disk_reserve_bytes": self._reserve(self._disk_reserve, disk, MOST_DISK_RESERVE),
        }

    @staticmethod
    def _reserve(given: int | None, amount: Amount | None, most: int) -> int:
        if given is not None:
            return given
        return 0 if amount is None else amount.reserve(most)

    def memory(self) -> Amount | None:
        """What can still be had without swapping; None where the kernel does not tell."""
        found = []
        info = _fields(self._proc / "meminfo")
        if "MemAvailable" in info:
            found.append(Amount(info["MemAvailable"] * 1024, info.get("MemTotal", 0) * 1024))
        found += [amount for group in self._groups if (amount := group.memory()) is not None]
        return min(found, key=lambda amount: amount.left, default=None)

    def disk(self) -> tuple[Amount, Amount | None]:
        """Bytes and inodes of the data directory's file system; None where it has no fixed number of inodes."""
        status = os.statvfs(self._data_dir)
        size = Amount(status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize)
        return size, Amount(status.f_favail, status.f_files) if status.f_files else None


@dataclass(frozen=True)
class MemoryGroup:
    """A control group above the daemon, or its own, that can have a memory limit."""

    path: Path
    version: int

    def memory(self) -> Amount | None:
        """What its limit leaves, cache counted as free; None if it has none."""
        limit_name, used_name, cache = _GROUP_FILES[self.version]
        limit = _text(self.path / limit_name).strip()
        if not limit.isdigit() or int(limit) >= 1 << 60:  # version 1 says "none" by a huge number
            return None
        used = _text(self.path / used_name).strip()
        reclaimable = _fields(self.path / "memory.stat").get(cache, 0)
        return Amount(int(limit) - int(used or 0) + reclaimable, int(limit))


_GROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def memory_groups(proc: Path) -> list[MemoryGroup]:
    """The control groups whose memory limits hold for this process: its own and those above it, either version."""
    own: dict[str, str] = {}
    for line in _text(proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        own.update(dict.fromkeys(controllers.split(","), path))
    found: list[MemoryGroup] = []
    for line in _text(proc / "self/mounts").splitlines():
        _, top, kind, options, *_ = line.split()
        if kind != "cgroup2" and (kind != "cgroup" or "memory" not in options.split(",")):
            continue
        version = 2 if kind == "cgroup2" else 1
        base = Path(top)
        group = base / own.get("" if version == 2 else "memory", "/").lstrip("/")
        # In a container the path may be the outer one, and the mount already is the group.
        for one in (group, *group.parents):
            if one.is_relative_to(base) and (one / _GROUP_FILES[version][0]).exists():
                found.append(MemoryGroup(one, version))
    return list(dict.fromkeys(found))


def _fields(path: Path) -> dict[str, int]:
    """`name value` or `name: value kB`, a line each."""
    rows = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
