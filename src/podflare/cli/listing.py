"""`podflare ls`: the sandboxes of a daemon."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from podflare.cli.daemon import NAMED_HOST
from podflare.cli.terminal import console, one_line

if TYPE_CHECKING:
    from podflare.wire.api import SandboxInfo, SandboxUsage

_COLUMNS = ("id", "state", "template", "engine", "memory limit", "age", "metadata")
_USAGE_COLUMNS = ("memory", "private", "processes", "changed files")
_MAX_COUNTED_FILES = 100_000


def ls(
    host: str | None = NAMED_HOST,
    usage: bool = typer.Option(False, "--usage", help="Measure what each uses: memory, processes, changed files."),
    as_json: bool = typer.Option(False, "--json", help="A JSON array instead of a table."),
) -> None:
    """List the sandboxes of the daemon that --host or the environment names.

    Only your own: a daemon with API keys shows each key its sandboxes.
    """
    from podflare import Client

    with Client(named_daemon(host)) as client:
        sandboxes = client.list_sandboxes(usage=usage)
    if as_json:
        print(json.dumps([sandbox.to_json() for sandbox in sandboxes], indent=2))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in (*_COLUMNS[:-1], *(_USAGE_COLUMNS if usage else ()), _COLUMNS[-1]):
        table.add_column(column)
    for sandbox in sandboxes:
        table.add_row(*_row(sandbox, with_usage=usage))
    console().print(table)


def named_daemon(host: str | None) -> str | None:
    """`host`, if it or the environment names a daemon: a private one would have nothing to show."""
    from podflare.client._config import find_address

    if find_address(host, None) is None:
        raise typer.BadParameter("no daemon named; give its address or set PODFLARE_HOSTD_URL", param_hint="--host")
    return host


def _row(sandbox: SandboxInfo, *, with_usage: bool) -> list[str]:
    metadata = " ".join(f"{key}={value}" for key, value in sorted(sandbox.metadata.items()))
    memory = f"{sandbox.ram_mib} MiB"
    age = age_of(sandbox, time.time())
    texts = [sandbox.id, sandbox.state, sandbox.template, sandbox.engine, memory, age]
    if with_usage:
        used = sandbox.usage
        texts += [_mib(used.memory_bytes), *usage_texts(used)] if used else ["?"] * len(_USAGE_COLUMNS)
    return [one_line(text) for text in (*texts, metadata)]


def usage_texts(usage: SandboxUsage) -> tuple[str, str, str]:
    """Private memory, processes, changed files."""
    more = "+" if usage.changed_files >= _MAX_COUNTED_FILES else ""
    return _mib(usage.private_memory_bytes), str(usage.processes), f"{usage.changed_files}{more}"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"


def age_of(sandbox: SandboxInfo, now_s: float) -> str:
    """How old a sandbox is, in its largest unit."""
    seconds = max(0, int(now_s - sandbox.created_at_ms / 1000))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
