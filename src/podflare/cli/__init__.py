"""The `podflare` command: text in, text out.  Everything it does goes through the SDK or `podflare.serve`.

`serve` is dispatched before anything else is imported: the first `Sandbox()` of a process waits for it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: this process's) and return its exit code.

    0 success, 1 failure (one line on stderr), 2 wrong usage; `run` passes the cell's own exit code on.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["serve"]:
        from podflare.cli.serve import run_serve

        return run_serve(words[1:])
    from podflare.cli.app import run_app

    return run_app(words)


__all__ = ["main"]
