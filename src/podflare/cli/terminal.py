"""What may reach the user's terminal, and how: rich on a terminal, plain in a pipe, hostile bytes defused.

Knows nothing of sandboxes.
"""

from __future__ import annotations

import os
import re
import sys
from typing import IO, TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

# Colours and text attributes: the one kind of escape sequence that can only change how text looks.
_STYLE = r"\x1b\[[0-9;:]*m"
_UNSAFE = re.compile(f"({_STYLE})|[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f]")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def is_rich(stream: IO[str]) -> bool:
    """Whether `stream` is a terminal that may get colours (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def console(stream: TextIO | None = None) -> Console:
    """A rich console on `stream` (default stdout) that writes plain text where `is_rich` says so."""
    from rich.console import Console

    target = stream or sys.stdout
    plain = not is_rich(target)
    # In a pipe a table keeps one row a line, whatever its width: scripts cut it, nobody looks at it.
    width = None if target.isatty() else 1000
    return Console(file=target, no_color=plain, highlight=False, markup=False, emoji=False, width=width, soft_wrap=True)


def one_line(text: str) -> str:
    """`text` as part of one line of ours: every control and direction character shown as its escape."""
    return _CONTROL.sub(lambda match: ascii(match.group())[1:-1], text)


def for_terminal(text: str) -> str:
    """Sandbox output for a terminal: tabs, newlines, carriage returns and colours pass, everything else is shown.

    A sandbox is hostile: sequences that set the title, write the clipboard or make the terminal answer stay text.
    """
    return _UNSAFE.sub(lambda match: match.group(1) or ascii(match.group())[1:-1], text)


def write_output(text: str, stream: TextIO) -> None:
    """Write sandbox output with its newline: bytes as they are into a pipe, defused on a terminal."""
    if stream.isatty():
        text = for_terminal(text)
        if "\x1b" in text:
            text += "\x1b[0m"
    stream.flush()
    data = (text + "\n").encode("utf-8", "replace")
    buffer = getattr(stream, "buffer", None)
    if buffer is None:  # a stream that somebody put in place of stdout
        stream.write(data.decode("utf-8"))
    else:
        buffer.write(data)
        buffer.flush()


def complain(message: str) -> None:
    """One line on stderr that says what went wrong."""
    print(f"podflare: {one_line(message)}", file=sys.stderr)
