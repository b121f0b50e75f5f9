"""`make check`: every static promise of the repository, two checks at a time, output only where one fails."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PYTHON = sys.executable
CODE = [name for name in ("src", "tests", "scripts", "benchmarks") if (ROOT / name).is_dir()]

# Longest first, so that the two workers end together.
CHECKS: list[tuple[str, list[str]]] = [
    ("types", [str(BIN / "mypy"), "--strict"]),
    ("imports", [str(BIN / "lint-imports")]),
    ("cli reference", [PYTHON, "scripts/cli_reference.py", "--check"]),
    ("format", [str(BIN / "ruff"), "format", "--check", *CODE]),
    ("lint", [str(BIN / "ruff"), "check", *CODE]),
    ("generated client", [PYTHON, "scripts/unasync.py", "--check"]),
    ("file sizes", [PYTHON, "scripts/file_sizes.py"]),
    ("syscalls page", [PYTHON, "scripts/syscalls_reference.py", "--check"]),
    ("engines page", [PYTHON, "scripts/engines_reference.py", "--check"]),
    ("links", [PYTHON, "scripts/doc_links.py"]),
    ("shell", ["bash", "-n", ".ci/run", "scripts/setup.sh", "scripts/lock.sh"]),
]
LIMIT_S = 300


def run(check: tuple[str, list[str]]) -> bool:
    """Run one check, say how it went, return whether it passed."""
    name, command = check
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "NO_COLOR": "1"},
        )  # fmt: skip
        passed, output = done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired:
        passed, output = False, f"no end after {LIMIT_S} s"
    seconds = time.monotonic() - started
    report = f"{'ok    ' if passed else 'FAILED'} {name} ({seconds:.1f} s)\n"
    if not passed:
        report += f"       {' '.join(command)}\n{output.rstrip()}\n"
    sys.stdout.write(report)
    sys.stdout.flush()
    return passed


def main() -> int:
    with ThreadPoolExecutor(max_workers=2) as pool:
        results = list(pool.map(run, CHECKS))
    failed = results.count(False)
    print(f"{len(results) - failed} checks passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
