"""`Sandbox()` without an address in a fresh process: the private daemon starts, then later sandboxes find it there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from benchmarks.series import Series

_PROGRAM = """
import json, time
started = time.perf_counter()
from podflare import Sandbox
first = Sandbox()
assert first.run_code("print(1 + 1)").stdout == "2"
times = [time.perf_counter() - started]
for _ in range(5):
    time.sleep(0.3)
    started = time.perf_counter()
    with Sandbox() as later:
        later.run_code("print(1 + 1)")
        times.append(time.perf_counter() - started)
first.close()
print(json.dumps(times))
"""


def measure(full: bool) -> list[Series]:
    keep = {name: value for name, value in os.environ.items() if not name.startswith("PODFLARE_")}
    first, later = [], []
    for _ in range(10 if full else 4):
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM], check=True, stdout=subprocess.PIPE, env=keep, timeout=120
        )
        times = [seconds * 1000 for seconds in json.loads(done.stdout)]
        first.append(times[0])
        later += times[1:]
    return [
        Series("first embedded Sandbox() to first output", "ms", tuple(first), "<= 1000 ms", note="import included"),
        Series("later embedded Sandbox() to first output", "ms", tuple(later), "<= 15 ms"),
    ]
