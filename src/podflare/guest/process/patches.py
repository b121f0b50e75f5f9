"""Tells how two entries differ: kinds, sizes, and for text a patch as git writes it.  Bounded in number, size, time.

Runs where compare.py does, over content that hostile user code wrote.
"""

from __future__ import annotations

import difflib
import io
import json
import os
import signal
import time
from types import FrameType
from typing import Dict, List, Optional

from podflare.guest.process.compare import Entry

MAX_PATCHES = 200
MAX_FILE_BYTES = 1 << 20
MAX_PATCH_BYTES = 8 * 1024 * 1024
"""Of all patches of one answer together."""
TIME_S = 5.0
"""For all patches of one answer: the lines of two files can be such that comparing them takes minutes."""


class _TimeIsUp(Exception):
    pass


class Details:
    """A compare.Notice that remembers, by path, what the answer tells of it (wire.api.PathChange)."""

    def __init__(self) -> None:
        self.by_path: Dict[str, Dict[str, object]] = {}
        self._patches_left = MAX_PATCHES
        self._bytes_left = MAX_PATCH_BYTES
        self._ends_s = time.monotonic() + TIME_S

    def __call__(self, path: str, before: Optional[Entry], after: Optional[Entry]) -> None:
        known = after or before
        body: Dict[str, object] = {
            "kind": known.kind if known is not None else "directory",
            "size_before": before.size if before is not None else None,
            "size_after": after.size if after is not None else None,
        }
        patch = self._patch(path, before, after)
        if patch:
            body["patch"] = patch
        self.by_path[path] = body

    def _patch(self, path: str, before: Optional[Entry], after: Optional[Entry]) -> str:
        left_s = self._ends_s - time.monotonic()
        if not self._patches_left or left_s <= 0:
            return ""
        old, new = _content(before), _content(after)
        if old is None or new is None:
            return _mode_change(before, after)
        try:
            body = _within(left_s, old, new, path, before, after)
        except _TimeIsUp:
            return ""
        patch = _mode_change(before, after) + body
        size = len(patch.encode("utf-8", "surrogateescape"))
        if size > self._bytes_left:
            return ""
        self._patches_left -= 1
        self._bytes_left -= size
        return patch


def _content(entry: Optional[Entry]) -> Optional[List[str]]:
    """The lines of a text file, or the target of a link; nothing for no entry, None for what has no text."""
    if entry is None:
        return []
    try:
        if entry.kind == "link":
            return [entry.target()]
        if entry.kind != "file" or entry.status.st_size > MAX_FILE_BYTES:
            return None
        fd = entry.open()
        try:
            data = os.read(fd, MAX_FILE_BYTES + 1)
        finally:
            os.close(fd)
        if len(data) > MAX_FILE_BYTES or b"\0" in data:
            return None
        # Not splitlines: only a newline ends a line here.
        return io.StringIO(data.decode("utf-8"), newline="\n").readlines()
    except (OSError, ValueError):
        return None  # gone or changed meanwhile; not UTF-8


def _mode_change(before: Optional[Entry], after: Optional[Entry]) -> str:
    if before is None or after is None or before.mode == after.mode or before.kind != after.kind:
        return ""
    return f"old mode {before.mode:o}\nnew mode {after.mode:o}\n"


def _within(
    seconds: float, old: List[str], new: List[str], path: str, before: Optional[Entry], after: Optional[Entry]
) -> str:
    """The unified diff.  Raises: _TimeIsUp; precondition: this is the main thread."""

    def stop(number: int, frame: Optional[FrameType]) -> None:
        raise _TimeIsUp

    names = ("/dev/null" if entry is None else _shown(side + path) for side, entry in (("a", before), ("b", after)))
    from_name, to_name = names
    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        return "".join(_ended(line) for line in difflib.unified_diff(old, new, from_name, to_name))
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


def _ended(line: str) -> str:
    return line if line.endswith("\n") else line + "\n\\ No newline at end of file\n"


def _shown(path: str) -> str:
    """A path in a patch's header: one line of text whatever it holds."""
    return path if path.isprintable() else json.dumps(path)
