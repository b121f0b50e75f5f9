"""The commands under one roof, and the one place where expected errors become a line on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from podflare.cli import doctor, egress, gateway, image, listing, repl, run, serve, showcase, snapshot, template, tree
from podflare.cli.terminal import complain, is_rich
from podflare.errors import PodflareError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


_AS_GIVEN = {"ignore_unknown_options": True, "allow_extra_args": True}


def make_app() -> typer.Typer:
    """The typer application with every command."""
    app = typer.Typer(
        name="podflare",
        help="Linux sandboxes for AI agents: a live Python REPL on your own machine.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich" if is_rich(sys.stdout) else None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback()(_root)
    app.command("run")(run.run)
    app.command("repl")(repl.repl)
    app.command("ls")(listing.ls)
    app.command("tree")(tree.tree)
    app.command("egress")(egress.egress)
    app.command("doctor")(doctor.doctor)
    app.add_typer(template.make_group(), name="template")
    app.add_typer(image.make_group(), name="image")
    app.add_typer(snapshot.make_group(), name="snapshot")
    app.command("serve", add_help_option=False, context_settings=_AS_GIVEN)(_serve)
    app.command("gateway")(gateway.gateway)
    app.command("demo")(showcase.demo)
    return app


def _serve(context: typer.Context) -> None:
    """Serve sandboxes over HTTP: the host daemon."""
    raise typer.Exit(serve.run_serve(context.args))


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"podflare {version('podflare')}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", help="Show the version and exit.", callback=_version, is_eager=True
    ),
) -> None:
    """Linux sandboxes for AI agents: a live Python REPL on your own machine.

    Commands talk to the daemon named by --host or PODFLARE_HOSTD_URL; without one they start a private
    daemon that ends with them.
    """


def run_app(arguments: Sequence[str]) -> int:
    """Run `arguments`; expected errors become one line on stderr and exit code 1."""
    try:
        make_app()(args=list(arguments), prog_name="podflare")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone; keep the interpreter from complaining about it at its own end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except PodflareError as error:
        complain(str(error) or type(error).__name__)
        return 1
    return 0
