"""`podflare repl`: a sandbox's REPL at the user's prompt."""

from __future__ import annotations

import ast
import codeop
import sys
from typing import TYPE_CHECKING

import typer

from podflare.cli.cells import run_cell, show_output
from podflare.cli.daemon import ENGINE, HOST, TEMPLATE
from podflare.cli.snapshot import SNAPSHOT
from podflare.cli.terminal import complain, write_output
from podflare.errors import PodflareError, SandboxNotFound
from podflare.wire.events import EXIT, RESULT

if TYPE_CHECKING:
    from podflare import Event, Sandbox

_LEAVING = frozenset(("exit", "quit", "exit()", "quit()"))


def repl(
    template: str | None = TEMPLATE,
    engine: str | None = ENGINE,
    snapshot: str | None = SNAPSHOT,
    host: str | None = HOST,
) -> None:
    """Talk to a sandbox's Python line by line; `!command` runs bash.

    A block ends at an empty line.  Ctrl-C interrupts the running cell, or drops the line being typed; Ctrl-D, exit
    and quit end the sandbox.
    """
    from podflare import Sandbox

    interactive = sys.stdin.isatty()
    if interactive:
        _edit_lines()
    with Sandbox(host=host, template=template, engine=engine, snapshot=snapshot) as sandbox:
        if interactive:
            print(f"podflare: sandbox {sandbox.id}. Ctrl-C interrupts, Ctrl-D ends, !command is bash.")
        while (cell := _read_cell(interactive)) is not None:
            if cell.strip() in _LEAVING:
                return
            if cell.strip() and not _run(sandbox, cell):
                raise typer.Exit(1)


def _edit_lines() -> None:
    """Line editing and history for input(), where the interpreter was built with it."""
    try:
        import readline
    except ImportError:
        return
    if "libedit" not in (readline.__doc__ or ""):
        readline.parse_and_bind("tab: self-insert")


def _read_cell(interactive: bool) -> str | None:
    """One complete cell, or None at the end of input."""
    lines: list[str] = []
    while True:
        prompt = ("... " if lines else ">>> ") if interactive else ""
        try:
            lines.append(input(prompt))
        except EOFError:
            if interactive:
                print()
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:
            print()
            lines.clear()
            continue
        if is_complete("\n".join(lines)):
            return "\n".join(lines)


def is_complete(source: str) -> bool:
    """Whether `source` can run: a block is complete with an empty line after it, wrong syntax is complete too."""
    if source.startswith("!"):
        return True
    compiler = codeop.CommandCompiler()
    compiler.compiler.flags |= ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    try:
        return compiler(source, "<cell>", "single") is not None
    except (SyntaxError, ValueError, OverflowError):
        return True  # the sandbox's own Python says what is wrong


def _run(sandbox: Sandbox, cell: str) -> bool:
    """Run one cell; False if there is no sandbox any more."""
    bash = cell.startswith("!")
    try:
        run_cell(sandbox, cell[1:] if bash else cell, language="bash" if bash else "python", show=_show)
    except KeyboardInterrupt:
        complain("left the cell; it is being ended")
    except SandboxNotFound as error:
        complain(str(error))
        return False
    except PodflareError as error:
        complain(str(error))
    return True


def _show(event: Event) -> None:
    show_output(event)
    if event.type == RESULT and isinstance(event.data, dict):
        kinds = sorted(set(event.data) - {"text/plain"})
        write_output(str(event.data.get("text/plain") or f"<{', '.join(kinds)}>"), sys.stdout)
    elif event.type == EXIT and event.extra.get("restarted"):
        complain("the REPL had to be restarted: variables are gone, files are kept")
