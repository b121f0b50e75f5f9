"""`podflare demo`: shows the example agent at work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from podflare.cli.daemon import HOST
from podflare.cli.terminal import console, for_terminal, is_rich

if TYPE_CHECKING:
    from rich.console import Console

    from podflare.demo import Outcome, Start, Step

_OUTPUT_LINES = 30


def demo(
    host: str | None = HOST,
    model: str | None = typer.Option(None, help="Model to ask when ANTHROPIC_API_KEY is set."),
    scripted: bool = typer.Option(False, "--scripted", help="Use the scripted model even if ANTHROPIC_API_KEY is set."),
) -> None:
    """Watch an agent clean and sum up a data set in a sandbox, over several turns.

    With ANTHROPIC_API_KEY set the agent is Claude.  Without, a scripted model that ships with the demo answers over
    HTTP on this machine, and nothing leaves it.
    """
    from podflare.demo import Start, run_demo

    out = console()

    def show(happened: Start | Step) -> None:
        if isinstance(happened, Start):
            _show_start(out, happened)
        else:
            _show_step(out, happened)

    _show_outcome(out, run_demo(show, host=host, model=model, scripted=scripted))


def _show_start(out: Console, start: Start) -> None:
    who = f"{start.model} at {start.address}"
    if start.scripted:
        who += "\n         (a local script, not a language model; set ANTHROPIC_API_KEY to talk to Claude)"
    out.print(f"model    {who}")
    out.print(f"sandbox  {start.sandbox_id}, made in {start.create_s * 1000:.0f} ms")


def _show_step(out: Console, step: Step) -> None:
    from rich.syntax import Syntax
    from rich.text import Text

    out.print()
    if step.said:
        out.print(Text(f"[{step.number}] {for_terminal(step.said)}", "bold"))
    if is_rich(out.file):
        out.print(Syntax(for_terminal(step.code).rstrip(), "python", background_color="default", word_wrap=True))
    else:
        out.print(_indented(step.code, "    "))
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
