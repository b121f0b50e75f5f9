"""Which files two machines have otherwise: their first processes tell what there is, without a pause.

Both have the same image below, so what is as in the image needs no look.  What they tell is hostile: bounded here, and
wrong at most about their own files.
"""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from podflare.engines.microvm.machine import MicrovmMachine
from podflare.errors import Conflict, MachineFailed, TooLarge
from podflare.wire.api import Diff, PathChange

KINDS = ("file", "directory", "link", "fifo", "socket", "device")
MAX_ENTRIES = 200_000
MAX_PATH_CHARS = 4096
MAX_DIGEST_CHARS = 4096
MAX_SIZE = 2**62
MAX_PATCHES = 200
"""Files of one comparison whose text is compared."""
MAX_PATCH_CHARS = 64 * 1024
TEXT_BYTES = 256 * 1024
_PATCHED_AT_ONCE = 16


@dataclass(frozen=True)
class Entry:
    """What one machine has under a path."""

    kind: str
    mode: int
    size: int
    digest: str

    def same_as(self, other: Entry) -> bool:
        if (self.kind, self.mode) != (other.kind, other.mode) or "?" in (self.digest, other.digest):
            return False
        return self.digest == other.digest and (self.kind != "file" or self.size == other.size)


async def compare_machines(
    before: MicrovmMachine, after: MicrovmMachine, paths: tuple[str, ...], *, detail: bool, timeout_s: float
) -> Diff:
    """See engines.base.Machine.diff."""
    if before.root != after.root:
        raise Conflict("the two sandboxes were started from different images")
    outermost = _outermost(paths)
    one, other = await asyncio.gather(*(_manifest(machine, outermost, timeout_s) for machine in (before, after)))
    added = sorted(path for path in other if path not in one)
    removed = sorted(path for path in one if path not in other)
    modified = sorted(path for path, entry in one.items() if path in other and not entry.same_as(other[path]))
    details: dict[str, PathChange] | None = None
    if detail:
        small = [path for path in modified if _is_small(one[path], other[path])]
        patches = await _patches(before, after, small, timeout_s)
        details = {
            path: _change(one.get(path), other.get(path), patches.get(path)) for path in (*added, *removed, *modified)
        }
    return Diff(tuple(added), tuple(removed), tuple(modified), details)


async def _manifest(machine: MicrovmMachine, paths: list[str], timeout_s: float) -> dict[str, Entry]:
    answer = await machine.control.ask({"manifest": {"paths": paths}}, timeout_s=timeout_s)
    if "too_much" in answer:
        raise TooLarge(f"the sandboxes' files could not be compared: {str(answer['too_much'])[:300]}")
    rows = answer.get("manifest")
    if not isinstance(rows, list) or len(rows) > MAX_ENTRIES:
        raise MachineFailed("a virtual machine told no list of its files")
    return dict(read_row(row) for row in rows)


def read_row(row: object) -> tuple[str, Entry]:
    """Decode one row of guest/vm/manifest.py.  Raises: MachineFailed for anything else."""
    if isinstance(row, list) and len(row) == 5:
        path, kind, mode, size, digest = row
        if (
            isinstance(path, str)
            and path.startswith("/")
            and "\0" not in path
            and len(path) <= MAX_PATH_CHARS
            and kind in KINDS
            and type(mode) is int
            and 0 <= mode <= 0o7777
            and type(size) is int
            and -1 <= size <= MAX_SIZE
            and isinstance(digest, str)
            and len(digest) <= MAX_DIGEST_CHARS
        ):
            return path, Entry(kind, mode, size, digest)
    raise MachineFailed(f"a virtual machine told of a file what cannot be: {row!r:.200}")


def _outermost(paths: tuple[str, ...]) -> list[str]:
    found: list[str] = []
    for path in sorted(set(paths)):
        if not any(path == known or path.startswith(known.rstrip("/") + "/") for known in found):
            found.append(path)
    return found


def _is_small(one: Entry, other: Entry) -> bool:
    return one.kind == other.kind == "file" and max(one.size, other.size) <= TEXT_BYTES


async def _patches(before: MicrovmMachine, after: MicrovmMachine, paths: list[str], timeout_s: float) -> dict[str, str]:
    patches: dict[str, str] = {}
    for start in range(0, min(len(paths), MAX_PATCHES), _PATCHED_AT_ONCE):
        some = paths[start : start + _PATCHED_AT_ONCE]
        one, other = await asyncio.gather(*(_texts(machine, some, timeout_s) for machine in (before, after)))
        for path in some:
            if path in one and path in other:
                patches[path] = _patch(path, one[path], other[path])
    return patches


async def _texts(machine: MicrovmMachine, paths: list[str], timeout_s: float) -> dict[str, str]:
    answer = await machine.control.ask({"manifest": {"texts": paths}}, timeout_s=timeout_s)
    told: Any = answer.get("texts")
    if not isinstance(told, Mapping):
        return {}
    return {path: text for path in paths if isinstance(text := told.get(path), str) and len(text) <= TEXT_BYTES}


def _patch(path: str, one: str, other: str) -> str:
    lines = difflib.unified_diff(one.splitlines(True), other.splitlines(True), f"a{path}", f"b{path}")
    return "".join(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines)[
        :MAX_PATCH_CHARS
    ]


def _change(one: Entry | None, other: Entry | None, patch: str | None) -> PathChange:
    kind = (other or one or Entry("file", 0, 0, "")).kind
    return PathChange(kind, _size(one), _size(other), patch)


def _size(entry: Entry | None) -> int | None:
    return None if entry is None or entry.size < 0 else entry.size
