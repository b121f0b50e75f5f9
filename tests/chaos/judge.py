"""What must be true of all that was seen: clients' reports held against what was killed.  No I/O."""

from __future__ import annotations

import json
import threading
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

from chaos import processes

VM_ENDED = "its virtual machine ended"
VM_KINDS = (processes.HYPERVISOR, processes.HYPERVISOR_HELPER)
"""Of which each sandbox has one of its own."""
RESTARTED = "the daemon that ran it has ended"
SHOWN = 150
"""Lines of history before a violation."""
LATE_S = 15.0
"""A death may be noticed so long after the kill; a broken connection is noticed at once."""


@dataclass(frozen=True)
class Hit:
    """Something of ours was killed or stopped."""

    at: float
    kind: str
    deed: str
    born: frozenset[str] = frozenset()
    """Starts of the first processes of the sandboxes that it may have ended."""


@dataclass
class Judge:
    """Everything that is known of a run."""

    calm: bool = True
    """Nothing is being killed: every operation must succeed."""
    hits: list[Hit] = field(default_factory=list)
    daemon_ends: list[float] = field(default_factory=list)
    told: set[str] = field(default_factory=set)
    """Ids that some client was told."""
    under_way: dict[str, str] = field(default_factory=dict)
    """Worker -> what it is doing."""
    ended_vms: int = 0
    lost_workers: set[str] = field(default_factory=set)
    """Those that were killed in the middle of an operation."""
    operations: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    deaths: Counter[str] = field(default_factory=Counter)
    slowest: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    violations: list[str] = field(default_factory=list)
    history: deque[str] = field(default_factory=lambda: deque(maxlen=20_000))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def hit(self, hit: Hit) -> None:
        with self._lock:
            self.hits.append(hit)
            self.history.append(f"{hit.at:.3f} ** {hit.deed} {hit.kind}")

    def note(self, at: float, text: str) -> None:
        with self._lock:
            self.history.append(f"{at:.3f} -- {text}")

    def violation(self, text: str) -> None:
        with self._lock:
            self._break(text)

    def _break(self, text: str) -> None:
        self.history.append(f"VIOLATION {text}")
        self.violations.append(text + "\n    " + "\n    ".join(list(self.history)[-SHOWN:]))

    def hear(self, client: str, line: str) -> None:
        """One report of a client."""
        try:
            said: dict[str, Any] = json.loads(line)
        except ValueError:
            self.violation(f"{client} said {line!r}")
            return
        with self._lock:
            self.history.append(line.strip())
            handler = getattr(self, f"_{said['what']}", None)
            if handler is not None:
                handler(said)

    # With the lock held, one for each kind of report.

    def _violation(self, said: dict[str, Any]) -> None:
        self._break(f"{said['worker']}: {said['text']}")

    def _begins(self, said: dict[str, Any]) -> None:
        self.under_way[said["worker"]] = said["operation"]

    def _ends(self, said: dict[str, Any]) -> None:
        self.under_way.pop(said["worker"], None)
        operation, outcome = said["operation"].lstrip("_"), said["outcome"]
        self.operations[operation] += 1
        self.slowest[operation] = max(self.slowest[operation], said["took"])
        if outcome != "ok":
            self.errors[f"{operation}: {outcome}"] += 1
            if self.calm:
                self._break(f"nothing was killed, and {operation} of {said['worker']} ended with {outcome}")

    def _told(self, said: dict[str, Any]) -> None:
        if said["id"] in self.told:
            self._break(f"{said['id']} was given out twice")
        self.told.add(said["id"])

    def _dead(self, said: dict[str, Any]) -> None:
        cause = said["cause"].partition("is gone: ")[2]
        self.deaths[cause.partition(" sbx_")[0][:60]] += 1
        since, at = said["since"], said["at"]
        if cause.startswith(VM_ENDED):
            self.ended_vms += 1
            if self.ended_vms > sum(hit.deed == "kill" and hit.kind in VM_KINDS for hit in self.hits):
                self._break(f"{said['id']} ended, though fewer hypervisors than that were killed: {cause}")
        restarted = any(since <= end <= at for end in self.daemon_ends)
        if cause.startswith((RESTARTED, "it was closed", "merged into")):
            # Closed and merged sandboxes are nobody's any more, unless the answer was cut off.
            excused = restarted
        else:
            excused = restarted or any(
                since - LATE_S <= hit.at <= at and (not said["born"] or said["born"] in hit.born) for hit in self.hits
            )
        if not excused:
            self._break(f"{said['id']} (born {said['born']}) died, though nothing of it was touched: {cause}")

    def _cut(self, said: dict[str, Any]) -> None:
        if not any(said["since"] - 1.0 <= end <= said["at"] for end in self.daemon_ends):
            self._break(f"a connection of {said['worker']} broke, though its daemon lived: {said['text']}")

    # Looks at what is left.

    def client_was_killed(self, workers: list[str]) -> None:
        with self._lock:
            for worker in workers:
                if self.under_way.pop(worker, None) is not None:
                    self.lost_workers.add(worker)

    def explains(self, sandbox: dict[str, Any]) -> bool:
        """Whether somebody was told of a sandbox that is there, or could not be, for it was killed."""
        return sandbox["id"] in self.told or sandbox["metadata"].get("client") in self.lost_workers

    def report(self) -> str:
        deeds = Counter(f"{hit.deed} {hit.kind}" for hit in self.hits)
        lines = [
            f"events      {len(self.hits)}: {_told_counts(deeds)}",
            f"operations  {self.operations.total()}: {_told_counts(self.operations)}",
            "slowest     " + ", ".join(f"{name} {took:.1f} s" for name, took in sorted(self.slowest.items())),
            f"errors      {self.errors.total()}: {_told_counts(self.errors)}",
            f"deaths      {self.deaths.total()}: {_told_counts(self.deaths)}",
            f"violations  {len(self.violations)}",
        ]
        return "\n".join(lines)


def _told_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())
