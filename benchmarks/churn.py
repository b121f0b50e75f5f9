"""How many sandboxes a second go through create, first output and close, several clients at a time."""

from __future__ import annotations

import threading
import time

from benchmarks.daemon import Daemon
from benchmarks.series import Series

CLIENTS = 4
CODE = "print(1 + 1)"


def measure(full: bool) -> list[Series]:
    seconds = 10.0 if full else 4.0
    with Daemon("--pool-size", "8") as daemon:
        _rate(daemon, 1.0)
        rates = tuple(_rate(daemon, seconds) for _ in range(3))
    return [
        Series(
            "sustained create + first output + close", "1/s", rates, ">= 40 /s", note=f"{CLIENTS} clients, closed loop"
        )
    ]


def _rate(daemon: Daemon, seconds: float) -> float:
    """Sandboxes a second over `seconds`."""
    done = [0] * CLIENTS
    started = time.perf_counter()

    def client(number: int) -> None:
        while time.perf_counter() - started < seconds:
            with daemon.sandbox() as sandbox:
                sandbox.run_code(CODE)
            done[number] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - started)
