"""`make bench`: runs every benchmark, prints a table, writes benchmarks/results/<time>.json.

python -m benchmarks.run [--full] [NAME ...]     NAME as below; all without
python -m benchmarks.run --spec RESULT.json      write those figures into SPEC.md
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.series import Series, ratios

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NAMES = (
    "create",
    "embedded",
    "hot_cell",
    "memory",
    "churn",
    "files",
    "fork",
    "loop",
    "gateway",
    "neighbours",
    "microvm",
)
MARKS = ("<!-- figures: written by python -m benchmarks.run --spec -->", "<!-- end of figures -->")


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").splitlines()[0])
    options.add_argument("names", nargs="*", metavar="NAME", help=f"which to run (all): {' '.join(NAMES)}")
    options.add_argument("--full", action="store_true", help="more rounds, and the fleet of 500 sandboxes")
    options.add_argument("--spec", metavar="RESULT.json", help="run nothing; write these figures into SPEC.md")
    given = options.parse_args()
    if given.spec:
        return write_spec(Path(given.spec))
    unknown = set(given.names) - set(NAMES)
    if unknown:
        options.error(f"unknown benchmark {', '.join(sorted(unknown))}")
    series: list[Series] = []
    failed = []
    for name in given.names or NAMES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            series += importlib.import_module(f"benchmarks.{name}").measure(given.full)
        except Exception as error:  # noqa: BLE001 - one broken benchmark must not cost the figures of the others
            failed.append(name)
            print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr)
    show(series)
    print(f"written: {save(series, given.full).relative_to(ROOT)}")
    return 1 if failed else 0


def show(series: list[Series]) -> None:
    """The table of one run."""
    ratio = {item.name: f"{times:.1f}x" for item, times in ratios(series)}
    table = Table(title=None, header_style="bold")
    for column in ("operation", "median", "p95", "unit", "n", "faster than peer", "goal"):
        table.add_column(column, justify="right" if column in ("median", "p95", "n", "faster than peer") else "left")
    for item in series:
        table.add_row(item.name, *_figures(item), item.unit, str(len(item.values)), ratio.get(item.name, ""), item.goal)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _figures(item: Series) -> tuple[str, str]:
    digits = 0 if item.median >= 100 else 1 if item.median >= 10 else 2
    return f"{item.median:,.{digits}f}", f"{item.p95:,.{digits}f}"


def save(series: list[Series], full: bool) -> Path:
    """Write the run as JSON.  It names the machine by what matters for the figures."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    now = time.gmtime()
    path = RESULTS / f"{time.strftime('%Y%m%dT%H%M%SZ', now)}.json"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    body: dict[str, Any] = {
        "at": time.strftime("%Y-%m-%d", now),
        "commit": commit.stdout.strip(),
        "full": full,
        "machine": {
            "cores": os.cpu_count(),
            "kernel": os.uname().release,
            "python": platform.python_version(),
            "root": os.geteuid() == 0,
        },
        "series": [item.to_json() for item in series],
    }
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    return path


def _measured_on(body: dict[str, Any]) -> str:
    machine = body["machine"]
    who = "root" if machine["root"] else "an ordinary user"
    where = f"{machine['cores']} cores, Linux {machine['kernel']}, Python {machine['python']}"
    return f"Measured {body['at']} on {where}, as {who}."


def write_spec(result: Path) -> int:
    """Put the figures of `result` between the marks in SPEC.md."""
    body = json.loads(result.read_text(encoding="utf-8"))
    fields = ("name", "unit", "values", "goal", "peer", "note")
    series = [
        Series(**{key: tuple(row[key]) if key == "values" else row[key] for key in fields}) for row in body["series"]
    ]
    ratio = {item.name: f"{times:.1f}x" for item, times in ratios(series)}
    lines = [
        MARKS[0],
        _measured_on(body),
        "",
        "| operation | median | p95 | unit | n | faster than peer | goal |",
        "|---|---:|---:|---|---:|---:|---|",
    ]
    for item in series:
        cells = (item.name, *_figures(item), item.unit, str(len(item.values)), ratio.get(item.name, ""), item.goal)
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    page = ROOT / "SPEC.md"
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    _, found, after = rest.partition(MARKS[1])
    if not found:
        print("SPEC.md has no marks to write between", file=sys.stderr)
        return 1
    page.write_text(before + "\n".join([*lines, MARKS[1]]) + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
