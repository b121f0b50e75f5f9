"""Paths of files in a sandbox, absolute and without `.` and `..`: which lie where, which are apart.  Pure."""

from __future__ import annotations

from typing import Iterable, List

IDENTITY = frozenset(["/etc/machine-id"])
"""Files that tell one machine from another: never merged."""


def is_inside(path: str, parent: str) -> bool:
    """Whether it is this directory, or lies below it."""
    return path == parent or path.startswith(parent.rstrip("/") + "/")


def outermost(paths: Iterable[str]) -> List[str]:
    """Without those that lie below others; sorted."""
    found: List[str] = []
    for path in sorted(set(paths)):
        if not any(is_inside(path, known) for known in found):
            found.append(path)
    return found
