"""`python -m benchmarks.compare A.json B.json`: what changed between two runs by more than their own scatter."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

NOISE_MEDIAN_DEVIATIONS = 3.0
"""A median that moved by less than so many median absolute deviations is reported as unchanged."""


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    before, after = (_series(Path(name)) for name in sys.argv[1:])
    for name in after:
        if name not in before:
            print(f"new        {name}")
            continue
        print(verdict(name, before[name], after[name]))
    for name in before.keys() - after.keys():
        print(f"gone       {name}")
    return 0


def _series(path: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))["series"]}


def verdict(name: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    """One line: the two medians, the change, and whether it is more than scatter."""
    old, new = statistics.median(before["values"]), statistics.median(after["values"])
    scatter = max(_deviation(before["values"]), _deviation(after["values"]))
    moved = abs(new - old) > NOISE_MEDIAN_DEVIATIONS * scatter and abs(new - old) > 0.02 * abs(old)
    percent = f"{(new - old) / old:+.1%}" if old else "n/a"
    return f"{'CHANGED' if moved else 'unchanged':10} {name}: {old:.3g} -> {new:.3g} {after['unit']} ({percent})"


def _deviation(values: list[float]) -> float:
    middle = statistics.median(values)
    return statistics.median(abs(value - middle) for value in values)


if __name__ == "__main__":
    sys.exit(main())
