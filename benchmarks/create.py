"""From nothing to the first output of a new sandbox: from the pool, without a pool, and Jupyter's way."""

from __future__ import annotations

from time import perf_counter

from benchmarks.daemon import Daemon
from benchmarks.jupyter_peer import Jupyter
from benchmarks.series import Series

CODE = "print(1 + 1)"
PEER = "Jupyter: create to first output"


def measure(full: bool) -> list[Series]:
    rounds = 60 if full else 25
    with Daemon("--pool-size", "4") as daemon:
        _, from_pool = _creates(daemon, rounds)
    with Daemon("--pool-size", "0") as daemon:
        cold_create, cold_all = _creates(daemon, rounds)
    jupyter = tuple(_jupyter() for _ in range(5 if full else 3))
    return [
        Series("create to first output, pool hit", "ms", from_pool, "<= 8 ms; >= 50x faster than Jupyter", PEER),
        Series("create, no pool", "ms", cold_create, "<= 15 ms", note="as the SDK sees it, HTTP included"),
        Series("create to first output, no pool", "ms", cold_all, peer=PEER),
        Series(PEER, "ms", jupyter),
    ]


def _creates(daemon: Daemon, rounds: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Milliseconds to the created sandbox and to its first output, one sandbox at a time."""
    created, first_output = [], []
    for number in range(rounds + 3):
        daemon.settle()
        started = perf_counter()
        with daemon.sandbox() as sandbox:
            there = perf_counter()
            sandbox.run_code(CODE)
            ended = perf_counter()
        if number >= 3:  # the first ones warm the connection and the page cache
            created.append((there - started) * 1000)
            first_output.append((ended - started) * 1000)
    return tuple(created), tuple(first_output)


def _jupyter() -> float:
    started = perf_counter()
    with Jupyter() as jupyter:
        jupyter.run(CODE)
        return (perf_counter() - started) * 1000
