"""`podflare demo`: shows the examples at work."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

import typer

from podflare.cli.daemon import HOST
from podflare.cli.terminal import console, for_terminal, is_rich
from podflare.errors import BadRequest

if TYPE_CHECKING:
    from rich.console import Console

    from podflare.demo import HostedStart, Outcome, Start, Step

_OUTPUT_LINES = 30


def demo(
    host: str | None = HOST,
    model: str | None = typer.Option(None, help="Model to ask when ANTHROPIC_API_KEY is set."),
    scripted: bool = typer.Option(False, "--scripted", help="Use the scripted model even if ANTHROPIC_API_KEY is set."),
    way: int | None = typer.Option(
        None, metavar="1|3", help="Show one way only: 1 a client tool, 3 the gateway; default: both."
    ),
) -> None:
    """Watch Claude use a sandbox: with a tool of your own, and in the place of Anthropic's hosted tool.

    First an agent cleans and sums up a data set in a sandbox, over several turns.  Then a program that declares
    the hosted code execution tool runs as it is, with ANTHROPIC_BASE_URL pointed at a `podflare gateway`.

    With ANTHROPIC_API_KEY set the model is Claude.  Without, a scripted model that ships with the demo answers over
    HTTP on this machine, and nothing leaves it.
    """
    if way not in (None, 1, 3):
        raise BadRequest(f"--way must be 1 or 3, got {way}")
    signal.signal(signal.SIGTERM, _leave)  # what was started is ended on the way out
    out = console()
    if way != 3:
        _show_client_tool(out, host, model, scripted)
    if way is None:
        out.print()
    if way != 1:
        _show_gateway(out, host, model, scripted)


def _leave(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _show_client_tool(out: Console, host: str | None, model: str | None, scripted: bool) -> None:
    from podflare.demo import Start, run_demo

    def show(happened: Start | Step) -> None:
        if isinstance(happened, Start):
            _show_start(out, happened)
        else:
            _show_step(out, happened)

    _heading(out, "A tool of your own: the program has the loop, the sandbox runs what the model calls.")
    _show_outcome(out, run_demo(show, host=host, model=model, scripted=scripted))


def _show_gateway(out: Console, host: str | None, model: str | None, scripted: bool) -> None:
    from rich.text import Text

    from podflare.demo import HostedStart, run_hosted

    def show(happened: HostedStart | str) -> None:
        if isinstance(happened, HostedStart):
            out.print(f"gateway  {happened.gateway}, in front of {happened.upstream}")
            out.print(f"program  {happened.program}:\n")
            _show_code(out, happened.program.read_text(encoding="utf-8"))
            out.print(Text(f"\n$ ANTHROPIC_BASE_URL={happened.gateway} python {happened.program.name}", "bold"))
        else:
            out.print("  > " + for_terminal(happened))

    _heading(out, "No line of change: a program for Anthropic's hosted tool, its address pointed at the gateway.")
    run_hosted(show, host=host, model=model, scripted=scripted)
    out.print("what ran Claude's code, in a sandbox of this machine; the program is none the wiser")


def _heading(out: Console, text: str) -> None:
    from rich.text import Text

    out.print(Text(f"== {text}", "bold cyan"))


def _show_code(out: Console, code: str) -> None:
    from rich.syntax import Syntax

    if is_rich(out.file):
        out.print(Syntax(for_terminal(code).rstrip(), "python", background_color="default", word_wrap=True))
    else:
        out.print(_indented(code, "    "))


def _show_start(out: Console, start: Start) -> None:
    who = f"{start.model} at {start.address}"
    if start.scripted:
        who += "\n         (a local script, not a language model; set ANTHROPIC_API_KEY to talk to Claude)"
    out.print(f"model    {who}")
    out.print(f"sandbox  {start.sandbox_id}, made in {start.create_s * 1000:.0f} ms")


def _show_step(out: Console, step: Step) -> None:
    from rich.text import Text

    out.print()
    if step.said:
        out.print(Text(f"[{step.number}] {for_terminal(step.said)}", "bold"))
    _show_code(out, step.code)
    mark = "failed, " if step.failed else ""
    out.print(Text(_indented(_clipped(step.output), "  > "), "red" if step.failed else "dim"))
    out.print(Text(f"    {mark}{step.seconds * 1000:.1f} ms", "dim"))


def _show_outcome(out: Console, outcome: Outcome) -> None:
    from rich.text import Text

    out.print()
    out.print(Text("answer   " + for_terminal(outcome.answer), "bold green"))
    if outcome.summary:
        out.print(f"file     /root/summary.md, {len(outcome.summary)} characters, downloaded from the sandbox")
    out.print(
        f"what ran {outcome.steps} programs in one sandbox of engine {outcome.engine} behind "
        f"{len(outcome.walls)} walls ({', '.join(outcome.walls)}); create {outcome.create_s * 1000:.0f} ms, "
        f"programs {outcome.cells_s * 1000:.0f} ms, all in all {outcome.total_s:.1f} s"
    )


def _indented(text: str, margin: str) -> str:
    return "\n".join(margin + for_terminal(line) for line in text.rstrip().split("\n"))


def _clipped(text: str) -> str:
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) <= _OUTPUT_LINES:
        return "\n".join(lines)
    half = _OUTPUT_LINES // 2
    return "\n".join([*lines[:half], f"... {len(lines) - 2 * half} lines ...", *lines[-half:]])
