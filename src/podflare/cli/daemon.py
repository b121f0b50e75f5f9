"""The options with which a command says where its sandbox lives."""

from __future__ import annotations

import typer

HOST: str | None = typer.Option(
    None,
    metavar="URL",
    help="Daemon to use, http://... or unix:/path; default: PODFLARE_HOSTD_URL, else a private daemon.",
)
NAMED_HOST: str | None = typer.Option(
    None, "--host", metavar="URL", help="Daemon to ask, http://... or unix:/path; default: PODFLARE_HOSTD_URL."
)
TEMPLATE: str | None = typer.Option(None, help="What the sandbox starts from.")
ENGINE: str | None = typer.Option(
    None, metavar="NAME", help="What makes the sandbox: process or microvm; default: the daemon's."
)
