"""What one machine of the process engine holds by itself: memory that nobody shares, files that it changed.

Looks from outside, costs a walk through page tables and files, so it runs in a thread and only when asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from podflare.engines.base import MAX_COUNTED_FILES, Usage

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_DEPTH = 64
"""Files in deeper directories are not counted: each level holds a descriptor of the daemon open."""
_IDENTITY_FILES = 1
"""In the writable layer of every machine from its birth on: /etc/machine-id."""
_MAX_PROCESSES = 4096
"""What is looked at of one machine; its own limit is far below, its family's may not be."""


def add_detail(usage: Usage, pids: Iterable[int], directory: Path) -> Usage:
    """`usage` with what only a close look tells.  What ends or vanishes meanwhile counts nothing.

    Args:
        pids: the machine's processes.
        directory: where its writable layers are.
    """
    pids = list(pids)
    shares = [share for pid in pids if (share := _memory(pid)) is not None]
    written = _Written()
    for layer in directory.glob("*/upper"):
        written.below(str(layer))
    return Usage(
        memory_bytes=usage.memory_bytes or sum(proportional for proportional, _ in shares),
        private_memory_bytes=sum(private for _, private in shares),
        processes=len(pids),
        disk_bytes=written.disk_bytes,
        changed_files=max(0, written.files - _IDENTITY_FILES),
        oom_kills=usage.oom_kills,
    )


def processes_below(agent: int, namespace: str) -> Iterator[int]:
    """Processes in the PID namespace `namespace` (the text of its link) at or below the process `agent`.

    For computers without control groups.  The agent itself may be closed to an ordinary user, and is left out then.
    """
    pending, seen = [agent], 0
    while pending and seen < _MAX_PROCESSES:
        pid = pending.pop()
        seen += 1
        try:
            if str(Path(f"/proc/{pid}/ns/pid").readlink()) == namespace:
                yield pid
        except OSError:
            pass
        try:
            with open(f"/proc/{pid}/task/{pid}/children") as children:
                pending += [int(word) for word in children.read().split()]
        except OSError:
            continue


def _memory(pid: int) -> tuple[int, int] | None:
    """(its share of all pages that it maps, those that it alone maps) in bytes; None if it is gone or closed to us."""
    share = private = 0
    try:
        with open(f"/proc/{pid}/smaps_rollup") as lines:
            for line in lines:
                name, _, rest = line.partition(":")
                if name == "Pss":
                    share = int(rest.split()[0]) * 1024
                elif name.startswith("Private_"):
                    private += int(rest.split()[0]) * 1024
    except (OSError, ValueError):
        return None
    return share, private


class _Written:
    """Counts the writable layers of a machine.  Goes from descriptor to name: user code changes them meanwhile."""

    def __init__(self) -> None:
        self.files = self.disk_bytes = 0

    def below(self, path: str, depth: int = 0, parent: int | None = None) -> None:
        """Count a directory and those in it, as far as bounds allow."""
        try:
            folder = os.open(path, _DIRECTORY, dir_fd=parent)
        except OSError:
            return
        try:
            for name in self._entries(folder):
                if depth < _MAX_DEPTH and self.files < MAX_COUNTED_FILES:
                    self.below(name, depth + 1, folder)
        finally:
            os.close(folder)

    def _entries(self, folder: int) -> list[str]:
        """Count what is no directory; return the others' names."""
        folders = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if self.files >= MAX_COUNTED_FILES:
                    break
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                self.files += 1
                # What has several names takes its blocks once.
                self.disk_bytes += status.st_blocks * 512 // max(1, status.st_nlink)
        return folders
