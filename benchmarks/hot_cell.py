"""A small cell in a sandbox that is already there, SDK to SDK, between Jupyter's and a bare echo's round trips."""

from __future__ import annotations

from benchmarks.daemon import Daemon
from benchmarks.echo_peer import Echo
from benchmarks.jupyter_peer import Jupyter
from benchmarks.series import Series, interleaved

CODE = "print(1 + 1)"
JUPYTER = "Jupyter: hot cell"
ECHO = "bare NDJSON echo, uvicorn + httpx"


def measure(full: bool) -> list[Series]:
    rounds = 500 if full else 150
    with Daemon() as daemon, daemon.sandbox() as sandbox, Jupyter() as jupyter, Echo() as echo:
        taken = interleaved(
            rounds,
            {
                "podflare": lambda: sandbox.run_code(CODE),
                "jupyter": lambda: jupyter.run(CODE),
                "echo": lambda: echo.run(CODE),
            },
            warm_ups=10,
        )
        # By itself: it forks, and what a fork costs the next Python cell is no part of that cell's figure.
        bash = interleaved(rounds // 2, {"bash": lambda: sandbox.run_code("echo 2", "bash")})["bash"]
    over = tuple(mine - floor for mine, floor in zip(taken["podflare"], taken["echo"], strict=True))
    return [
        Series("hot cell, SDK to SDK", "ms", taken["podflare"], ">= 3x faster than Jupyter", JUPYTER),
        Series("hot cell over the echo, same round", "ms", over, "<= 1 ms"),
        Series("bash cell", "ms", bash, note="a new shell each time"),
        Series(JUPYTER, "ms", taken["jupyter"]),
        Series(ECHO, "ms", taken["echo"]),
    ]
