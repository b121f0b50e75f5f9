"""`podflare egress`: what a sandbox may reach and what it tried to; and the options that say so for a new one."""

from __future__ import annotations

import json
import time

import typer
from rich.table import Table

from podflare.cli.daemon import NAMED_HOST
from podflare.cli.listing import named_daemon
from podflare.cli.terminal import console, one_line
from podflare.wire.egress import EgressEntry, EgressLog

EGRESS = typer.Option(False, "--egress", help="Let the sandbox reach every public address.")
ALLOW: list[str] = typer.Option(
    [],
    "--allow",
    metavar="NAME",
    help="Let it reach this name alone: api.example.com, *.example.org, host:port. Repeat.",
)
_COLUMNS = ("time", "verdict", "protocol", "to", "in", "out", "times", "reason")


def wanted(everything: bool, names: list[str]) -> bool | list[str] | None:
    """`egress` of the options; None if neither was given."""
    if everything and names:
        raise typer.BadParameter("--egress is every public address, --allow some names alone: give one of them")
    return names or (True if everything else None)


def egress(
    sandbox: str = typer.Argument(metavar="ID", help="The sandbox."),
    host: str | None = NAMED_HOST,
    as_json: bool = typer.Option(False, "--json", help="The daemon's answer as JSON."),
) -> None:
    """Tell what a sandbox may reach, and what it tried to, allowed or refused, oldest first."""
    from podflare import Client

    with Client(named_daemon(host)) as client:
        log = client.egress_log(sandbox)
    if as_json:
        print(json.dumps(log.to_json(), indent=2))
        return
    out = console()
    out.print(one_line(f"may reach: {_reach(log)}"))
    for name, hosts in sorted(log.secrets.items()):
        out.print(one_line(f"secret {name}: for {', '.join(hosts)}"))
    if log.dropped:
        out.print(f"{log.dropped} older entries are not kept")
    if not log.entries:
        out.print("nothing was tried")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in _COLUMNS:
        table.add_column(column)
    for entry in log.entries:
        table.add_row(*(one_line(text) for text in _row(entry)))
    out.print(table)


def _reach(log: EgressLog) -> str:
    if isinstance(log.egress, bool):
        return "every public address" if log.egress else "nothing"
    return ", ".join(log.egress) or ("hosts of secrets" if log.secrets else "nothing")


def _row(entry: EgressEntry) -> tuple[str, ...]:
    at = time.strftime("%H:%M:%S", time.localtime(entry.time_ms / 1000))
    target = entry.host or entry.address
    where = f"{target}:{entry.port}" if entry.port else target
    sizes = (str(entry.bytes_in), str(entry.bytes_out))
    return at, entry.verdict, entry.protocol, where, *sizes, str(entry.count), entry.reason
