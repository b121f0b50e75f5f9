"""Write src/podflare/client/_sync from src/podflare/client/_async, or check that it is up to date.

    python scripts/unasync.py            rewrite what is stale
    python scripts/unasync.py --check    exit 1 if anything is stale (for `make check`)

The source is ordinary code; the rules below turn its words.  Two marks in it steer single lines:
`# async only` drops the line, `# sync only: CODE` becomes CODE.  A rule or mark that nothing uses fails
the run, so that the list cannot rot.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src/podflare/client/_async"
TARGET = ROOT / "src/podflare/client/_sync"
CONFIG = ROOT / "pyproject.toml"

HEADER = "# Generated from _async/{name} by scripts/unasync.py: change that file, not this one.\n"

PHRASES = (
    (
        "The asynchronous SDK, written by hand.  `_sync` is generated from it by scripts/unasync.py.",
        "The synchronous SDK, generated from `_async`.",
    ),
    ("Describe the sandbox; it comes to be on entering the block or with `create`.", "Make a sandbox, ready for use."),
    (
        "this sandbox is not open: use `async with`, or `await AsyncSandbox.create()`",
        "this sandbox was not made: its constructor failed",
    ),
    ("`async with AsyncSandbox() as sandbox: ...` or `sandbox = await AsyncSandbox.create()`; closed", "Closed"),
    (
        "each in a task\n            of its own; it may be a coroutine function.",
        "each in a thread\n            of its own.",
    ),
    ("If cancelled or interrupted:", "If interrupted (Ctrl-C):"),
)
"""Whole phrases, in prose that means something else for the other kind."""

WORDS = {
    "AsyncClient": "Client",
    "AsyncConnection": "Connection",
    "AsyncGenerator": "Generator",
    "AsyncPtyCalls": "PtyCalls",
    "AsyncPtyHandle": "PtyHandle",
    "AsyncPtyNamespace": "PtyNamespace",
    "AsyncRule": "Rule",
    "AsyncSandbox": "Sandbox",
    "AsyncTransport": "SyncTransport",
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "_async": "_sync",
    "aclose": "close",
    "aclosing": "closing",
    "acquire_async": "acquire_sync",
    "aiter_bytes": "iter_bytes",
    "aread": "read",
    "beside_async": "beside_sync",
    "each_async": "each_sync",
    "explore_async": "explore",
    "handle_async_request": "handle_request",
    "in_thread_async": "in_thread_sync",
    "note_socket_async": "note_socket_sync",
    "outcome_async": "outcome_sync",
    "pieces_async": "pieces_sync",
    "release_async": "release_sync",
    "shield_async": "shield_sync",
}
KEYWORDS = (r"\basync (?=def|with|for)", r"\bawait ")
TYPES = ((r"\bGenerator\[(\w+), None\]", r"Generator[\1, None, None]"),)
DROP = re.compile(r".*# async only$")
KEEP = re.compile(r"^(\s*)# sync only: (.*)$")


class Rules:
    """The replacements, counting the use of each."""

    def __init__(self) -> None:
        self.unused: set[str] = {*(old for old, _ in PHRASES), *WORDS, *KEYWORDS, *(old for old, _ in TYPES)}
        self.unused |= {DROP.pattern, KEEP.pattern}

    def _sub(self, pattern: str, new: str, text: str, name: str) -> str:
        text, count = re.subn(pattern, new, text)
        if count:
            self.unused.discard(name)
        return text

    def apply(self, text: str) -> str:
        for old, new in PHRASES:
            text = self._sub(re.escape(old), new, text, old)
        lines = []
        for line in text.splitlines():
            if DROP.match(line):
                self.unused.discard(DROP.pattern)
                continue
            lines.append(self._sub(KEEP.pattern, r"\1\2", line, KEEP.pattern))
        text = "\n".join(lines) + "\n"
        for old, new in WORDS.items():
            text = self._sub(rf"\b{old}\b", new, text, old)
        for pattern in KEYWORDS:
            text = self._sub(pattern, "", text, pattern)
        for pattern, new in TYPES:
            text = self._sub(pattern, new, text, pattern)
        return text


def formatted(text: str, path: Path) -> str:
    """As `ruff` would leave it: words got shorter and imports changed their order."""
    lint = ["check", "--quiet", "--select", "I,F401,UP028,RET504", "--fix-only", "--unsafe-fixes"]
    for command in (lint, ["format", "--quiet"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", str(CONFIG), "--stdin-filename", str(path), "-"],
            input=text,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd=ROOT,
        )
        if done.returncode != 0:
            raise SystemExit(f"ruff failed on the code generated for {path.name}:\n{done.stderr}")
        text = done.stdout
    return text


def main(arguments: list[str]) -> int:
    check = arguments == ["--check"]
    if arguments and not check:
        print(__doc__, file=sys.stderr)
        return 2
    rules = Rules()
    stale = []
    sources = sorted(SOURCE.glob("*.py"))
    for source in sources:
        target = TARGET / source.name
        text = formatted(HEADER.format(name=source.name) + rules.apply(source.read_text("utf-8")), target)
        if not target.exists() or target.read_text("utf-8") != text:
            stale.append(target.name)
            if not check:
                target.write_text(text, "utf-8")
    extra = sorted({path.name for path in TARGET.glob("*.py")} - {path.name for path in sources})
    if rules.unused:
        print("unasync: rules that nothing uses:", *sorted(rules.unused), sep="\n  ", file=sys.stderr)
    if extra:
        print("unasync: files without a source in _async:", *extra, file=sys.stderr)
    if check and stale:
        print("unasync: stale, run scripts/unasync.py:", *stale, file=sys.stderr)
    if not check:
        print("unasync: wrote", *stale or ["nothing"])
    return 1 if rules.unused or extra or (check and stale) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
