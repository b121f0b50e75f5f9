"""What a sandbox was granted, and where the state that it has comes from.  Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from podflare.wire.api import ForkReport


@dataclass(frozen=True)
class Terms:
    """What the caller was granted.  Forks get the same."""

    template: str
    ram_mib: int
    rootfs_gb: int
    timeout_seconds: int | None
    idle_timeout_seconds: int | None
    metadata: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    engine: str = ""


@dataclass(frozen=True)
class Lineage:
    """Where a sandbox comes from."""

    parent_id: str | None = None
    generation: int = 0
    """Forks in the history of its state."""
    cells: int = 0
    """Cells that had run in its memory when it began."""
    fork_report: ForkReport | None = None
    snapshot: str | None = None
    """What it was made of, if that was one."""


def read_report(told: Mapping[str, Any]) -> ForkReport:
    """An engine's report in the form of the API."""
    return ForkReport(
        threads=tuple(told.get("threads", ())),
        processes=told.get("processes", 0),
        sockets=told.get("sockets", 0),
        pipes=told.get("pipes", 0),
        terminals=told.get("terminals", 0),
    )


def losses(report: ForkReport | None) -> str:
    """One line on what could not cross a fork; empty if everything did."""
    if report is None or report.lossless:
        return ""
    counts = {
        "background thread": len(report.threads),
        "process": report.processes,
        "socket": report.sockets,
        "pipe": report.pipes,
        "terminal": report.terminals,
    }
    told = ", ".join(f"{count} {_plural(name, count)}" for name, count in counts.items() if count)
    return f"[podflare] this sandbox is a fork; what stayed with its parent: {told}"


def _plural(name: str, count: int) -> str:
    return name if count == 1 else name + ("es" if name.endswith("s") else "s")
