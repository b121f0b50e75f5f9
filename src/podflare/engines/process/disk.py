"""The disk limit: looks at what machines have written and ends the one that has too much.

File systems that an ordinary user can mount have no quota, so the limit is watched: a look a second, which costs
one statvfs(2) while the disk stays as full as it was.  Between two looks a machine can pass its limit by what the
disk takes in a second; one file alone is held exactly (RLIMIT_FSIZE).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from podflare.engines.base import Death, MachineSpec

INTERVAL_S = 1.0
WORTH_A_LOOK_BYTES = 32 * 2**20
"""Less than this written on the whole file system since the last look: no machine can have grown by more."""


class Watched(Protocol):
    """What the watch needs of a machine."""

    spec: MachineSpec

    @property
    def directory(self) -> Path: ...

    def declare_dead(self, death: Death) -> None: ...

    async def aclose(self) -> None: ...


class DiskWatch:
    """Watches the machines below one directory.  `start`, `add`, `discard`, `aclose`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._machines: set[Watched] = set()
        self._task: asyncio.Task[None] | None = None
        self._free_at_look = 0

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def add(self, machine: Watched) -> None:
        self._machines.add(machine)

    def discard(self, machine: Watched) -> None:
        self._machines.discard(machine)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            status = os.statvfs(self._root)
            free = status.f_bavail * status.f_frsize
            if self._machines and self._free_at_look - free < WORTH_A_LOOK_BYTES:
                self._free_at_look = max(self._free_at_look, free)
                continue
            await self._look()
            self._free_at_look = free

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        for machine in tuple(self._machines):
            used = await loop.run_in_executor(None, disk_usage, machine.directory)
            limit = machine.spec.limits.disk_bytes
            if used > limit:
                text = (
                    f"disk full: this sandbox may write {limit / 2**30:g} GiB (rootfs_gb) and wrote {used / 2**30:.1f}"
                )
                machine.declare_dead(Death(text, out_of_disk=True))
                await machine.aclose()

    async def aclose(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])


def disk_usage(root: Path) -> int:
    """Bytes on disk below `root`, hard links once.  Follows no link; what vanishes meanwhile counts nothing."""
    seen: set[int] = set()
    total = 0
    for status in _walk(str(root)):
        if status.st_nlink > 1:
            if status.st_ino in seen:
                continue
            seen.add(status.st_ino)
        total += status.st_blocks * 512
    return total


def _walk(root: str) -> Iterator[os.stat_result]:
    pending = [root]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    status = entry.stat(follow_symlinks=False)
                    yield status
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
        except OSError:
            continue
