"""A program: patches of texts, as git writes them, read and answered as JSON.  Standard library only, run as a file.

A process of its own, because the texts are hostile: comparing two files' lines can take minutes, and ends here at a
limit of processor time, while whoever asked waits for nothing else.  Its text is as guest/process/patches.py makes it.

In: a list of [path, old or null, new or null, old mode, new mode]; old and new are text, modes are null where nothing
is compared.  Out: an object, path -> patch, of those that were made in time.
"""

from __future__ import annotations

import difflib
import io
import json
import resource
import signal
import sys
from typing import Any, NoReturn

MAX_PATCH_BYTES = 8 << 20
"""Of all together."""
TIME_S = 5.0
_HARD_S = 10


def patch(path: str, old: str | None, new: str | None, modes: tuple[int | None, int | None]) -> str:
    """Of one file.  None: there is none."""
    one, two = ("/dev/null" if text is None else _shown(side + path) for side, text in (("a", old), ("b", new)))
    before, after = (
        [] if text is None else io.StringIO(text, newline="\n").readlines() for text in (old, new)
    )  # not splitlines: only a newline ends a line here
    body = "".join(_ended(line) for line in difflib.unified_diff(before, after, one, two))
    head = f"old mode {modes[0]:o}\nnew mode {modes[1]:o}\n" if None not in modes and modes[0] != modes[1] else ""
    return head + body


def _ended(line: str) -> str:
    return line if line.endswith("\n") else line + "\n\\ No newline at end of file\n"


def _shown(path: str) -> str:
    """A path in a patch's header: one line of text whatever it holds."""
    return path if path.isprintable() else json.dumps(path)


class _TimeIsUp(Exception):
    pass


def _stop(*_: object) -> NoReturn:
    raise _TimeIsUp


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (_HARD_S, _HARD_S))
    rows: list[Any] = json.load(sys.stdin)
    made: dict[str, str] = {}
    left = MAX_PATCH_BYTES
    signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, TIME_S)
    try:
        for path, old, new, *modes in rows:
            text = patch(path, old, new, (modes[0], modes[1]))
            left -= len(text.encode("utf-8", "surrogateescape"))
            if left < 0:
                break
            if text:
                made[path] = text
    except _TimeIsUp:
        pass
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    json.dump(made, sys.stdout)


if __name__ == "__main__":
    main()
