"""`podflare snapshot`: keep sandboxes on disk, list and remove what is kept; and the option to go on from one."""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from podflare.cli.daemon import NAMED_HOST
from podflare.cli.listing import named_daemon
from podflare.cli.terminal import console, is_rich, one_line

if TYPE_CHECKING:
    from podflare.wire.api import SnapshotInfo

SNAPSHOT: str | None = typer.Option(None, metavar="NAME", help="Go on from a snapshot, in place of a template.")
_NAMES: list[str] = typer.Argument(metavar="NAME...", help="Snapshots.")
_COLUMNS = ("name", "engine", "template", "memory limit", "size", "taken", "of")


def make_group() -> typer.Typer:
    """The command group `podflare snapshot`."""
    group = typer.Typer(
        help="Keep sandboxes on disk with all that runs in them; list and remove what is kept.",
        no_args_is_help=True,
        rich_markup_mode="rich" if is_rich(sys.stdout) else None,
    )
    for command in (take, ls, rm):
        group.command(command.__name__)(command)
    return group


def take(
    sandbox: str = typer.Argument(metavar="ID", help="The sandbox; one of the engine microvm."),
    name: str = typer.Argument(metavar="NAME", help="1 to 64 letters, digits, '_', '.' and '-'."),
    host: str | None = NAMED_HOST,
) -> None:
    """Keep a sandbox on disk as it is now: memory, processes, files.  It goes on.

    `podflare run --snapshot NAME` and Sandbox(snapshot=NAME) go on from there, any number of times.
    """
    from podflare import Client

    with Client(named_daemon(host)) as client:
        found = client.snapshot_sandbox(sandbox, name)
    print(f"{one_line(found.name)} is kept: {found.size_bytes >> 20} MiB")


def ls(
    host: str | None = NAMED_HOST,
    as_json: bool = typer.Option(False, "--json", help="A JSON array instead of a table."),
) -> None:
    """List your snapshots."""
    from podflare import Client

    with Client(named_daemon(host)) as client:
        found = client.snapshots()
    if as_json:
        print(json.dumps([one.to_json() for one in found], indent=2))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in _COLUMNS:
        table.add_column(column)
    for one in found:
        table.add_row(*(one_line(text) for text in _row(one)))
    console().print(table)


def _row(one: SnapshotInfo) -> tuple[str, ...]:
    taken = f"{datetime.fromtimestamp(one.created_at_ms / 1000, timezone.utc):%Y-%m-%d %H:%M} UTC"
    size = f"{one.size_bytes >> 20} MiB"
    return one.name, one.engine, one.template, f"{one.ram_mib} MiB", size, taken, one.sandbox_id


def rm(names: list[str] = _NAMES, host: str | None = NAMED_HOST) -> None:
    """Remove snapshots.  Sandboxes that were made of them live on."""
    from podflare import Client

    with Client(named_daemon(host)) as client:
        for name in names:
            client.delete_snapshot(name)
            print(f"{one_line(name)} is removed")
