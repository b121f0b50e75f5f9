"""Reads what a virtual machine tells of a merge that was planned in it.  Pure.

It is the word of the machine that gets the changes, which user code may have taken over: bounded here, and wrong at
most about that machine's own files.
"""

from __future__ import annotations

from typing import Any

from podflare.engines.base import FileConflict, FilesPlan
from podflare.engines.microvm.diff import KINDS, MAX_ENTRIES, MAX_PATH_CHARS, MAX_SIZE
from podflare.errors import MachineFailed
from podflare.wire.merges import MergeSide

MAX_WHY_CHARS = 1000
MAX_VERSION_CHARS = 64


class _Unreadable(Exception):
    pass


def printable(text: str, most: int) -> str:
    """`text` with everything but printable characters replaced, and cut."""
    return "".join(sign if sign.isprintable() else "?" for sign in text[:most])


def read_plan(told: object) -> tuple[FilesPlan, int]:
    """The plan, and how many places it is about.  Raises: MachineFailed for anything else."""
    try:
        body = _dict(told)
        plan = FilesPlan(
            merged=tuple(sorted(_paths(body.get("merged")))),
            conflicts=tuple(_conflict(one) for one in _list(body.get("conflicts"))),
            skipped=tuple(_skipped(one) for one in _list(body.get("skipped"))),
        )
        touched = body.get("touched")
        if type(touched) is not int or len({one.path for one in plan.conflicts}) != len(plan.conflicts):
            raise _Unreadable
        return plan, touched
    except _Unreadable:
        raise MachineFailed("a virtual machine told of a merge what cannot be") from None


def _conflict(told: object) -> FileConflict:
    body = _dict(told)
    why, version = body.get("why"), body.get("version")
    if not isinstance(why, str) or not isinstance(version, str) or len(version) > MAX_VERSION_CHARS:
        raise _Unreadable
    return FileConflict(
        _path(body.get("name")),
        printable(why, MAX_WHY_CHARS),
        _side(body.get("ours")),
        _side(body.get("theirs")),
        version,
        tuple(_paths(body.get("paths"))),
        tuple(_paths(body.get("if_ours"))),
    )


def _side(told: object) -> MergeSide | None:
    if told is None:
        return None
    body = _dict(told)
    kind, size = body.get("type"), body.get("size")
    if kind not in KINDS or not (size is None or (type(size) is int and 0 <= size <= MAX_SIZE)):
        raise _Unreadable
    return MergeSide(kind, size)


def _skipped(told: object) -> tuple[str, str]:
    if not (isinstance(told, list) and len(told) == 2 and told[1] in KINDS):
        raise _Unreadable
    return _path(told[0]), told[1]


def _paths(told: object) -> list[str]:
    return [_path(one) for one in _list(told)]


def _path(told: object) -> str:
    if not (isinstance(told, str) and told.startswith("/") and "\0" not in told and len(told) <= MAX_PATH_CHARS):
        raise _Unreadable
    return told


def _list(told: object) -> list[Any]:
    if not isinstance(told, list) or len(told) > MAX_ENTRIES:
        raise _Unreadable
    return told


def _dict(told: object) -> dict[str, Any]:
    if not isinstance(told, dict):
        raise _Unreadable
    return told
