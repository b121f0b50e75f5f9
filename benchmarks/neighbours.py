"""What a hot cell of one sandbox takes while another one burns all that it can get, against a quiet machine.

python -m benchmarks.neighbours URL SANDBOX KIND     burn in that sandbox until the end of the input
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from benchmarks.daemon import Daemon
from benchmarks.series import Series, percentile, timed_ms
from podflare import PodflareError, Sandbox

CODE = "print(1 + 1)"
GOAL = "<= 3x quiet"
GROW_S = 1.0
"""From the start of the burning to the first measurement."""
BURNS = {
    "processors": "import os\nfor _ in range(4): os.fork()\nwhile True: pass",
    "memory": "while True: held = bytearray(800 << 20); del held",
    "memory beyond its limit": "hoard = []\nwhile True: hoard.append(bytearray(8 << 20))",
    "disk": (
        "import os\nblock = os.urandom(1 << 20)\nwhile True:\n"
        "    with open('/root/big', 'wb') as file:\n"
        "        for _ in range(512): file.write(block)\n"
        "        os.fsync(file.fileno())"
    ),
    "inodes": (
        "import os, itertools\nfor turn in itertools.count():\n    os.makedirs(f'/root/d{turn}')\n"
        "    for n in range(20_000): os.close(os.open(f'/root/d{turn}/{n}', os.O_CREAT))\n"
        "    for n in range(20_000): os.unlink(f'/root/d{turn}/{n}')"
    ),
    "processes": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "output": "import os\nblock = b'x' * 65535 + b'\\n'\nwhile True: os.write(1, block)",
    "empty lines": "import os\nblock = b'\\n' * 65536\nwhile True: os.write(1, block)",
    "forks": "",
}
"""Of what the other sandbox takes all it can get -> the cell; empty: the client asks for forks without end."""


def measure(full: bool) -> list[Series]:
    rounds = 10 if full else 4
    taken: dict[str, list[float]] = {kind: [] for kind in BURNS}
    quiet: dict[str, list[float]] = {kind: [] for kind in BURNS}
    with Daemon() as daemon, daemon.sandbox() as neighbour:
        for _ in range(20):
            neighbour.run_code(CODE)
        for _ in range(rounds):
            for kind in BURNS:
                # Before and after: on a shared machine the quiet is not the same from one minute to the next.
                calm = _cells(neighbour)
                with daemon.sandbox() as other, burning(daemon.url, other.id, kind):
                    burnt = _cells(neighbour)
                daemon.settle(0.5)
                calm += _cells(neighbour)
                quiet[kind] += calm
                taken[kind] += [one / percentile(calm, 50) for one in burnt]
    return [
        Series(
            f"hot cell beside a sandbox that burns {kind}",
            "x quiet",
            tuple(taken[kind]),
            GOAL,
            note=f"quiet: {percentile(quiet[kind], 50):.2f} ms",
        )
        for kind in BURNS
    ]


def _cells(sandbox: Sandbox) -> list[float]:
    return [timed_ms(lambda: sandbox.run_code(CODE)) for _ in range(25)]


@contextmanager
def burning(url: str, sandbox_id: str, kind: str) -> Iterator[None]:
    """Within the block the sandbox burns.  By a process of its own: this one's interpreter lock is no neighbour."""
    command = [sys.executable, "-m", "benchmarks.neighbours", url, sandbox_id, kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as burner:
        assert burner.stdin is not None and burner.stdout is not None
        burner.stdout.readline()
        try:
            with suppress(subprocess.TimeoutExpired):
                burner.wait(GROW_S)
            yield
        finally:
            burner.stdin.close()
            burner.kill()


def burn(url: str, sandbox_id: str, kind: str) -> None:
    """Burn until the standard input ends; a line on the standard output when it begins."""
    sandbox = Sandbox.connect(sandbox_id, host=url)
    print("burning", flush=True)

    def without_end() -> None:
        while True:
            with suppress(PodflareError):
                if BURNS[kind]:
                    for _ in sandbox.run_code_stream(BURNS[kind]):
                        pass
                else:
                    for fork in sandbox.fork(4):
                        fork.close()

    threading.Thread(target=without_end, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    burn(*sys.argv[1:])
