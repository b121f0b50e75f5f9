"""`podflare run`: one program in a sandbox of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import typer

from podflare.cli.cells import run_cell
from podflare.cli.daemon import ENGINE, HOST, TEMPLATE
from podflare.cli.egress import ALLOW, EGRESS, wanted
from podflare.cli.snapshot import SNAPSHOT

_BASH_SUFFIXES = (".sh", ".bash")
_LANGUAGES: dict[str, Literal["python", "bash"]] = {"python": "python", "bash": "bash"}


def run(
    file: str = typer.Argument("", metavar="FILE", help="Program to run; - reads it from standard input."),
    code: str | None = typer.Option(None, "-c", "--code", help="The program itself, in place of FILE."),
    language: str = typer.Option("", metavar="python|bash", help="Default: by the suffix of FILE, else python."),
    timeout: float | None = typer.Option(
        None, min=0.001, help="Seconds after which the program is ended (exit code 124)."
    ),
    template: str | None = TEMPLATE,
    engine: str | None = ENGINE,
    snapshot: str | None = SNAPSHOT,
    everything: bool = EGRESS,
    allow: list[str] = ALLOW,
    host: str | None = HOST,
) -> None:
    """Run a program in a new sandbox, stream its output, exit with its exit code.

    Standard output and error come through as they are; on a terminal, escape sequences other than colours are shown,
    not obeyed.  Ctrl-C interrupts the program.
    """
    if (code is None) == (not file):
        raise typer.BadParameter("give either FILE or -c CODE")
    reach = wanted(everything, allow)
    spoken = _language(language, file)
    source = _read(file) if code is None else code
    from podflare import Sandbox

    with Sandbox(host=host, template=template, engine=engine, snapshot=snapshot, egress=reach) as sandbox:
        exit_code = run_cell(sandbox, source, language=spoken, timeout_s=timeout)
    raise typer.Exit(exit_code if 0 <= exit_code <= 255 else exit_code & 0xFF or 1)


def _language(wanted: str, file: str) -> Literal["python", "bash"]:
    if not wanted:
        return "bash" if file.endswith(_BASH_SUFFIXES) else "python"
    if wanted in _LANGUAGES:
        return _LANGUAGES[wanted]
    raise typer.BadParameter(f"{wanted!r} is not a language of a sandbox: python or bash", param_hint="--language")


def _read(file: str) -> str:
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise typer.BadParameter(f"cannot read {file}: {error.strerror or error}", param_hint="FILE") from error
    except UnicodeDecodeError as error:
        raise typer.BadParameter(
            f"{file} is not UTF-8 text: {error.reason} at byte {error.start}", param_hint="FILE"
        ) from error
