"""`podflare doctor`: what this computer can and cannot wall off, and what to do about it."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from podflare.cli.terminal import console, is_rich, one_line
from podflare.engines.base import EngineReport


def doctor(as_json: bool = typer.Option(False, "--json", help="One JSON object instead of tables.")) -> None:
    """Tell which walls this computer offers, and how to get the missing ones.

    Exit code 0 if a sandbox can be made here, 1 if not.
    """
    from podflare.serve import probe_engines

    reports = probe_engines()
    if as_json:
        print(json.dumps(to_json(reports), indent=2))
    else:
        show(reports)
    raise typer.Exit(0 if any(report.usable for report in reports) else 1)


def to_json(reports: Sequence[EngineReport]) -> dict[str, Any]:
    """The object that --json prints."""
    system = os.uname()
    return {
        "usable": any(report.usable for report in reports),
        "system": {
            "kernel": system.release,
            "machine": system.machine,
            "python": platform.python_version(),
            "uid": os.geteuid(),
        },
        "engines": [asdict(report) for report in reports],
    }


def show(reports: Sequence[EngineReport]) -> None:
    """The tables, one for each engine."""
    out = console()
    system = os.uname()
    who = "root" if os.geteuid() == 0 else f"uid {os.geteuid()}"
    out.print(f"{system.sysname} {system.release} {system.machine}, Python {platform.python_version()}, {who}")
    for report in reports:
        out.print()
        out.print(Text.assemble("engine ", (report.engine, "bold"), ": ", _verdict(report)))
        if report.problem:
            out.print(f"  {one_line(report.problem)}")
        for note in report.notes:
            out.print(f"  {one_line(note)}")
        _show_walls(out, report)
    if not any(report.usable for report in reports):
        out.print("\nNo engine can make a sandbox here.")


def _verdict(report: EngineReport) -> tuple[str, str]:
    if not report.usable:
        return "not usable", "red"
    missing = sum(not wall.available for wall in report.walls)
    if missing:
        return f"usable, {missing} of {len(report.walls)} walls missing", "yellow"
    return "usable, every wall available", "green"


def _show_walls(out: Console, report: EngineReport) -> None:
    rows: list[tuple[str, str, str]] = [
        (status.wall, "yes" if status.available else "NO", one_line(status.detail)) for status in report.walls
    ]
    if report.usable:
        # No wall, but what can be asked for only where it is there.
        rows.append(("egress", "NO" if report.no_uplink else "yes", one_line(report.no_uplink)))
    if not is_rich(sys.stdout):
        for wall, mark, detail in rows:
            out.print(f"  {wall:<20} {mark:<4} {detail}".rstrip())
        return
    table = Table(box=None, show_header=False, padding=(0, 1))
    for wall, mark, detail in rows:
        table.add_row("", wall, Text(mark, "green" if mark == "yes" else "bold red"), Text(detail, overflow="fold"))
    out.print(table)
