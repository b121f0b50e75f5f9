"""The disk limit: looks at what machines have written, in bytes and in files, and ends the one that has too much.

File systems that an ordinary user can mount have no quota, so the limit is watched: a look a second, which costs
one statvfs(2) while the disk stays as full as it was.  Between two looks a machine can pass its limit by what the
disk takes in a second; one file alone is held exactly (RLIMIT_FSIZE).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from podflare.engines.base import Death, Limits, MachineSpec
from podflare.engines.process.nameless import nameless_bytes
from podflare.engines.process.written import MAX_DEPTH, TooDeep, measure

INTERVAL_S = 1.0
WORTH_A_LOOK_BYTES = 32 * 2**20
"""Less than this written on the whole file system since the last look: no machine can have grown by more."""
WORTH_A_LOOK_FILES = 4096


class Watched(Protocol):
    """What the watch needs of a machine."""

    spec: MachineSpec

    @property
    def directory(self) -> Path: ...

    def processes(self) -> Iterable[int]: ...

    def declare_dead(self, death: Death) -> None: ...

    async def aclose(self) -> None: ...


def excess(directory: Path, limits: Limits, processes: Callable[[], Iterable[int]] = tuple) -> str:
    """What of a machine's files is above its limits, for its user; empty if all is well.

    Args: processes: the machine's, which may have files open that have no name any more.
    """
    try:
        found = measure(directory, max_files=limits.max_files)
    except TooDeep:
        return f"disk full: directories in this sandbox are nested deeper than {MAX_DEPTH} levels"
    size = found.size + nameless_bytes(processes())
    allowed = f"{limits.disk_bytes / 2**30:g} GiB (rootfs_gb)"
    if size > limits.disk_bytes:
        return f"disk full: this sandbox may write {allowed} and wrote {size / 2**30:.1f}"
    if found.files > limits.max_files:
        return f"disk full: this sandbox may have {limits.max_files:,} files within {allowed} and made more"
    return ""


class DiskWatch:
    """Watches the machines below one directory.  `start`, `add`, `discard`, `aclose`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._machines: set[Watched] = set()
        self._task: asyncio.Task[None] | None = None
        self._free_at_look = (0, 0)
        """Bytes and inodes."""

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
            free = (status.f_bavail * status.f_frsize, status.f_ffree)
            size, files = (before - now for before, now in zip(self._free_at_look, free, strict=True))
            if self._machines and size < WORTH_A_LOOK_BYTES and files < WORTH_A_LOOK_FILES:
                self._free_at_look = (max(self._free_at_look[0], free[0]), max(self._free_at_look[1], free[1]))
                continue
            await self._look()
            self._free_at_look = free

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        for machine in tuple(self._machines):
            problem = await loop.run_in_executor(
                None, excess, machine.directory, machine.spec.limits, machine.processes
            )
            if problem:
                machine.declare_dead(Death(problem, out_of_disk=True))
                await machine.aclose()

    async def aclose(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
