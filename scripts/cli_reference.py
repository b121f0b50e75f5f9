"""Writes docs/cli.md from what the commands themselves say; with --check, fails if the page is stale."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "cli.md"
COMMANDS = (
    "",
    "run",
    "repl",
    "ls",
    "tree",
    "egress",
    "doctor",
    "template",
    "template build",
    "template ls",
    "template show",
    "template rm",
    "image",
    "image build",
    "image ls",
    "image rm",
    "snapshot",
    "snapshot take",
    "snapshot ls",
    "snapshot rm",
    "serve",
    "gateway",
    "demo",
)
HEAD = """\
# Command line

Written by `make docs` from `podflare --help`; do not edit.

Exit codes: 0 success, 1 failure with one line on stderr, 2 wrong usage, 130 after Ctrl-C; `podflare run` passes the
program's own exit code on. Colours and tables only on a terminal; `NO_COLOR` is respected.
"""


def help_of(command: str) -> str:
    """What `podflare COMMAND --help` prints into a pipe."""
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "LC_ALL": "C.UTF-8"}
    words = [sys.executable, "-m", "podflare", *command.split(), "--help"]
    done = subprocess.run(words, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=60)
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def page() -> str:
    """The whole page."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        texts = list(pool.map(help_of, COMMANDS))
    sections = [
        f"## podflare {command}".rstrip() + f"\n\n```text\n{text}\n```\n"
        for command, text in zip(COMMANDS, texts, strict=True)
    ]
    return "\n".join([HEAD, *sections])


def main() -> int:
    wanted = page()
    if "--check" not in sys.argv[1:]:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(wanted, encoding="utf-8")
        return 0
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != wanted:
        print("docs/cli.md is not what the commands say; run: make docs")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
