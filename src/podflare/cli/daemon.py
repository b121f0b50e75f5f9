"""The options with which a command says where its sandbox lives."""

from __future__ import annotations

import typer

HOST: str | None = typer.Option(
    None,
    metavar="URL",
    help="Daemon to use, http://... or unix:///path; default: the environment, else a private daemon.",
)
TEMPLATE: str | None = typer.Option(None, help="What the sandbox starts from.")
