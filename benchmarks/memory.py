"""What idle sandboxes cost: proportional memory of the daemon and all its processes, before and after."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.daemon import Daemon
from benchmarks.series import Series, timed_ms

MIB = 1024 * 1024
CODE = "print(1 + 1)"


def measure(full: bool) -> list[Series]:
    series = _idle(count=20)
    return series + _fleet(count=500) if full else series


def _idle(count: int) -> list[Series]:
    """One sandbox after the other, each having run a cell."""
    taken = []
    with Daemon("--pool-size", "0") as daemon, ExitStack() as stack:
        stack.enter_context(daemon.sandbox()).run_code(CODE)
        before = daemon.pss_bytes()
        for _ in range(count):
            stack.enter_context(daemon.sandbox()).run_code(CODE)
            after = daemon.pss_bytes()
            taken.append((after - before) / MIB)
            before = after
    return [Series("memory of one more idle sandbox (PSS)", "MiB", tuple(taken), note="each ran one cell")]


def _fleet(count: int) -> list[Series]:
    """Many at once: what they use together, and whether a hot cell still takes as long as with one."""
    with Daemon("--pool-size", "0") as daemon, ExitStack() as stack:
        first = stack.enter_context(daemon.sandbox())
        for _ in range(10):
            first.run_code(CODE)
        alone = tuple(timed_ms(lambda: first.run_code(CODE)) for _ in range(200))
        for _ in range(count - 1):
            stack.enter_context(daemon.sandbox()).run_code(CODE)
        memory_gib = daemon.pss_bytes() / MIB / 1024
        crowd = tuple(timed_ms(lambda: first.run_code(CODE)) for _ in range(200))
    return [
        Series(f"memory of {count} idle sandboxes, daemon included (PSS)", "GiB", (memory_gib,), "<= 6 GiB"),
        Series("hot cell, one sandbox on the machine", "ms", alone),
        Series(
            f"hot cell beside {count} idle sandboxes", "ms", crowd, "unchanged", "hot cell, one sandbox on the machine"
        ),
    ]
