"""Which of our processes is what, seen from outside: what a killer may choose from.

A process is known by its ancestors, the PID namespaces that it is in, and its name; by nothing that it says itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

DAEMON = "daemon"
ZYGOTE = "zygote"
PRELOAD = "preload"
"""The part of a zygote that has imported the modules of its template."""
ZYGOTE_HELPER = "zygote-helper"
"""Makes the namespaces of a family, and is gone."""
FAMILY = "family"
FAMILY_HELPER = "family-helper"
"""Copies, compares or merges files, or makes the agents of forks."""
AGENT = "agent"
REPL = "repl"
REPL_CHILD = "repl-child"
"""In the middle of a fork."""
BASH = "bash"
HYPERVISOR = "hypervisor"
"""With a whole virtual machine in it, of which nothing is seen from outside."""
HYPERVISOR_HELPER = "hypervisor-helper"
"""What a daemon of virtual machines starts for a moment: a hypervisor-to-be, tools for disks, text comparison."""
BRIEF = (ZYGOTE_HELPER, FAMILY_HELPER, REPL_CHILD, HYPERVISOR_HELPER)
"""They live for milliseconds, and have to be waited for."""


HELPER_S = 0.5
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    """As it was at one look."""

    pid: int
    parent: int
    name: str
    started: int
    """Clock ticks since boot: with the pid, this process and no other."""
    state: str
    pids: tuple[int, ...]
    """Its number in each of the nested PID namespaces, outermost first."""

    @property
    def depth(self) -> int:
        return len(self.pids)

    @property
    def age_s(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME) - self.started / _TICKS

    @property
    def is_first(self) -> bool:
        """Whether it is pid 1 of a namespace of its own."""
        return self.pids[-1] == 1


def look(pid: int) -> Process | None:
    """None if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    head, _, rest = stat.rpartition(")")
    fields = rest.split()
    numbers = next(line for line in status.splitlines() if line.startswith("NSpid:"))
    return Process(
        pid, int(fields[1]), head.partition("(")[2], int(fields[19]), fields[0], tuple(map(int, numbers.split()[1:]))
    )


class Census:
    """All processes of the machine, each read once.  What a process is does not change, but its parent may."""

    def __init__(self) -> None:
        self._known: dict[int, Process] = {}

    def new(self) -> list[Process]:
        """Those that came since the last look; quick enough to catch what lives for milliseconds."""
        pids = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        for gone in self._known.keys() - pids:
            del self._known[gone]
        found = []
        for pid in pids - self._known.keys():
            process = look(pid)
            if process is not None:
                self._known[pid] = process
                found.append(process)
        return found

    def all(self) -> dict[int, Process]:
        """Everything anew."""
        self._known.clear()
        self.new()
        return dict(self._known)

    def below(self, root: int) -> dict[int, Process]:
        """Descendants of `root`, everything anew."""
        return below(root, self.all())

    @property
    def known(self) -> Mapping[int, Process]:
        """As of the last look."""
        return self._known


def below(root: int, processes: dict[int, Process]) -> dict[int, Process]:
    found: dict[int, Process] = {}
    wave = {root}
    while wave:
        wave = {pid for pid, one in processes.items() if one.parent in wave and pid not in found}
        found.update({pid: processes[pid] for pid in wave})
    return found


def kind_of_vm(process: Process, daemon: int, _: Mapping[int, Process]) -> str:
    """Likewise, below a daemon of virtual machines."""
    if process.pid == daemon:
        return DAEMON
    if process.parent != daemon:
        return ""
    return HYPERVISOR if process.name.startswith("qemu-system") else HYPERVISOR_HELPER


def kind_of(process: Process, daemon: int, processes: Mapping[int, Process]) -> str:
    """What it is in the tree of `daemon`, which has processes for sandboxes; "" if nothing of ours.

    A family whose zygote was killed lives on below this process, which adopts what has no parent.
    """
    if process.pid == daemon:
        return DAEMON
    line = ancestors(process, processes)
    above = next((number for number, one in enumerate(line) if one.pid in (daemon, os.getpid())), None)
    if above is None:
        return ""
    base, parent = line[above].depth, line[0]
    if line[above].pid != daemon and (process, *line)[above].depth == base:
        return ""  # a program of ours that is no part of a daemon
    if process.depth == base:
        if parent.pid == daemon:
            return ZYGOTE
        # A part of a zygote has lasted; who makes a family has just begun.
        return PRELOAD if parent.parent == daemon and process.age_s > HELPER_S else ZYGOTE_HELPER
    if process.depth == base + 1:
        return FAMILY if process.is_first else FAMILY_HELPER
    if process.is_first:
        return AGENT
    if parent.depth == base + 1:
        return FAMILY_HELPER
    if parent.is_first:
        return BASH if process.name in ("bash", "sleep") else REPL
    return BASH if process.name in ("bash", "sleep") else REPL_CHILD


def ancestors(process: Process, processes: Mapping[int, Process]) -> list[Process]:
    """Its parent first."""
    found = []
    current = processes.get(process.parent)
    while current is not None and current not in found:
        found.append(current)
        current = processes.get(current.parent)
    return found


def family_of(process: Process, processes: dict[int, Process], base: int) -> list[Process]:
    """All of the family that it belongs to, as far as it belongs to one; `base` is the depth of the daemon."""
    for one in (process, *ancestors(process, processes)):
        if one.depth == base + 1 and one.is_first:
            return [one, *below(one.pid, processes).values()]
    return []


def still(processes: Iterable[Process]) -> list[Process]:
    """Those of them that are there still and have not ended."""
    found = []
    for one in processes:
        now = look(one.pid)
        if now is not None and now.started == one.started and now.state not in "ZX":
            found.append(one)
    return found
