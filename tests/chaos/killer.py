"""Kills and stops processes of ours at random, and remembers which sandboxes each deed may have cost."""

from __future__ import annotations

import contextlib
import heapq
import os
import random
import signal
import time

from chaos import processes as p
from chaos.engines import Engine
from chaos.judge import Hit, Judge
from chaos.processes import Census, Process

WAIT_S = 0.4
"""For a process of a kind that lives for milliseconds."""
STOP_S = (0.1, 3.0)


class Killer:
    """Chooses below one daemon at a time.  `resume_due` must be called now and then."""

    def __init__(self, engine: Engine, judge: Judge, draw: random.Random) -> None:
        self._engine = engine
        self._judge = judge
        self._draw = draw
        self._census = Census()
        self._stopped: list[tuple[float, int]] = []
        """When to resume whom (pidfd)."""

    def strike(self, daemon: int) -> None:
        """One deed, if there is a victim for it."""
        stop = self._draw.random() < 0.2
        table = self._engine.stops if stop else self._engine.kills
        kind = self._draw.choices(list(table), list(table.values()))[0]
        victim = self._find(kind, daemon)
        if victim is None:
            return
        self.do(victim, kind, daemon, signal.SIGSTOP if stop else signal.SIGKILL)

    def do(self, victim: Process, kind: str, daemon: int, number: signal.Signals) -> None:
        """Send the signal, unless the process has ended by itself."""
        try:
            pidfd = os.pidfd_open(victim.pid)
        except ProcessLookupError:
            return
        now = p.look(victim.pid)
        everything = self._census.all()
        base = everything[daemon].depth if daemon in everything else victim.depth
        # Looked up first: what is dead has no family.
        born = frozenset(
            str(one.started) for one in p.family_of(victim, everything, base) if one.is_first and one.depth > base + 1
        )
        if now is None or now.started != victim.started or not p.still([victim]):
            os.close(pidfd)
            return
        stop = number == signal.SIGSTOP
        self._judge.hit(Hit(time.monotonic(), kind, "stop" if stop else "kill", born))
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number)
        if stop:
            heapq.heappush(self._stopped, (time.monotonic() + self._draw.uniform(*STOP_S), pidfd))
        else:
            os.close(pidfd)

    def resume_due(self, *, all_of_them: bool = False) -> None:
        while self._stopped and (all_of_them or self._stopped[0][0] <= time.monotonic()):
            _, pidfd = heapq.heappop(self._stopped)
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
            os.close(pidfd)

    def _find(self, kind: str, daemon: int) -> Process | None:
        everything = self._census.all()
        if kind in p.BRIEF:
            deadline = time.monotonic() + WAIT_S
            while time.monotonic() < deadline:
                for process in self._census.new():
                    if self._engine.kind_of(process, daemon, self._census.known) == kind:
                        return process
                time.sleep(0.0005)
            return None
        found = [
            one
            for one in everything.values()
            if self._engine.kind_of(one, daemon, everything) == kind and one.state != "Z"
        ]
        return self._draw.choice(sorted(found, key=lambda one: one.pid)) if found else None
