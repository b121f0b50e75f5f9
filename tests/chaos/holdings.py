"""What a daemon holds of the machine: descriptors, memory, mounts, control groups, disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Holdings:
    """What an idle daemon holds."""

    fds: int
    rss_bytes: int
    mounts: int

    @classmethod
    def of(cls, pid: int) -> Holdings:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        mounts = len(Path("/proc/self/mountinfo").read_text().splitlines())
        return cls(len(os.listdir(f"/proc/{pid}/fd")), pages * os.sysconf("SC_PAGE_SIZE"), mounts)


def groups_of(instances: Iterable[str], engine: str) -> list[str]:
    """Control groups of machines of these daemon lives."""
    return [group for groups in groups_by_hierarchy(instances, engine) for group in groups]


def groups_by_hierarchy(instances: Iterable[str], engine: str) -> list[list[str]]:
    """Likewise, for each hierarchy that has some."""
    names = {f"podflare-{instance}-{engine}" for instance in instances}
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, top, kind, *_ = line.split()
        if kind in ("cgroup", "cgroup2"):
            groups = [path for path, _, _ in os.walk(top) if Path(path).parent.name in names]
            if groups:
                found.append(groups)
    return found


def disk_usage(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    total = 0
    for path, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
    return total
