"""The main use over a long time: rounds of fork(3), work in each, merge_into the best, close the rest."""

from __future__ import annotations

from benchmarks.daemon import Daemon
from benchmarks.series import Series, timed_ms
from podflare import Sandbox

MIB = 1 << 20
EDGE = 24
"""Rounds that count as the beginning, and as the end: one turn of the depth to which the kernel nests namespaces."""
STATE = "import json\ndata = {n: [n] for n in range(20_000)}\nsteps = []"


def measure(full: bool) -> list[Series]:
    rounds = 200 if full else 72
    taken: list[float] = []
    with Daemon("--pool-size", "0") as daemon, daemon.sandbox() as sandbox:
        sandbox.run_code(STATE)
        memory, disk = [], []
        for number in range(rounds):
            taken.append(_round(sandbox, number))
            if number in (EDGE, rounds - 1):
                memory.append(daemon.pss_bytes() / MIB)
                disk.append(daemon.disk_bytes() / MIB)
        assert sandbox.run_code("print(len(steps))").stdout.strip() == str(rounds)
    first = f"fork(3) in rounds 1-{EDGE} of a loop of fork, work and merge"
    last = f"fork(3) in rounds {rounds - EDGE + 1}-{rounds} of it"
    return [
        Series(first, "ms", tuple(taken[:EDGE])),
        Series(last, "ms", tuple(taken[-EDGE:]), "<= 2x the first rounds", first),
        Series(f"memory of the daemon after round {rounds}", "MiB", (memory[1],), f"as after {EDGE}: {memory[0]:.0f}"),
        Series(f"disk of the daemon after round {rounds}", "MiB", (disk[1],), f"as after {EDGE}: {disk[0]:.1f}"),
    ]


def _round(sandbox: Sandbox, number: int) -> float:
    """One round; the milliseconds of its fork."""
    children: list[Sandbox] = []
    taken = timed_ms(lambda: children.extend(sandbox.fork(3)))
    for child in children:
        child.run_code(f"steps.append({number}); open('/root/step', 'w').write('{number}')")
    sandbox.merge_into(children[0])
    for child in children[1:]:
        child.close()
    return taken
