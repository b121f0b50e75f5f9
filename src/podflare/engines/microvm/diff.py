"""Which files two machines have otherwise: their first processes tell what there is, without a pause.

Both have the same image below.  A file with the same mark in both (inode, times of change) is as in the image, or was
not written to since they were one, so only others are read.  What they tell is hostile: bounded here, and wrong at most
about their own files.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import anyio

from podflare.engines.microvm import patches
from podflare.engines.microvm.control import Control
from podflare.engines.microvm.machine import MicrovmMachine
from podflare.engines.microvm.origins import check_same_image
from podflare.errors import DeadlineExceeded, MachineFailed, TooLarge
from podflare.wire.api import Diff, PathChange
from podflare.wire.paths import outermost

KINDS = ("file", "directory", "link", "fifo", "socket", "device")
MAX_ENTRIES = 200_000
MAX_PATH_CHARS = 4096
MAX_MARK_CHARS = 4096
MAX_SIZE = 2**62
MAX_PATCHES = 200
"""Files of one comparison whose text is compared."""
TEXT_BYTES = 1 << 20
"""Of one such file."""
MAX_TEXT_BYTES = 32 << 20
"""Of all of them."""
MAX_ORDER_BYTES = 48 * 1024
"""Of the paths in one order (guest/vm/control.py)."""
_TEXTS_AT_ONCE_BYTES = 2 << 20
PATCHES_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Entry:
    """What one machine has under a path."""

    kind: str
    mode: int
    size: int
    mark: str
    """Of a link its target; of a file something that is another one whenever it was written to."""


async def compare_machines(
    before: MicrovmMachine, after: MicrovmMachine, paths: tuple[str, ...], *, detail: bool, timeout_s: float
) -> Diff:
    """See engines.base.Machine.diff."""
    check_same_image(before.root, after.root)
    wanted = outermost(paths)
    if len(json.dumps(wanted)) > MAX_ORDER_BYTES:
        raise TooLarge(f"the paths to compare are too long: more than {MAX_ORDER_BYTES >> 10} KiB together")
    try:
        with anyio.fail_after(timeout_s):
            return await _compare(before, after, wanted, detail, timeout_s)
    except TimeoutError:
        raise DeadlineExceeded(f"the sandboxes' files were not compared within {timeout_s:g} s") from None


async def _compare(
    before: MicrovmMachine, after: MicrovmMachine, paths: list[str], detail: bool, timeout_s: float
) -> Diff:
    one, other = await asyncio.gather(*(list_files(machine.control, paths, timeout_s) for machine in (before, after)))
    common = [path for path in one if path in other]
    same = await same_content(
        before.control, after.control, [path for path in common if unsure(one[path], other[path])], timeout_s
    )
    added = sorted(path for path in other if path not in one)
    removed = sorted(path for path in one if path not in other)
    modified = sorted(path for path in common if not (path in same or alike(one[path], other[path])))
    details: dict[str, PathChange] | None = None
    if detail:
        pairs = {path: (one.get(path), other.get(path)) for path in (*added, *removed, *modified)}
        made = await _patches(before, after, pairs, timeout_s)
        details = {path: _change(*pair, made.get(path)) for path, pair in pairs.items()}
    return Diff(tuple(added), tuple(removed), tuple(modified), details)


def alike(one: Entry, other: Entry) -> bool:
    """Whether they are certainly the same, without a look at contents."""
    if (one.kind, one.mode, one.mark) != (other.kind, other.mode, other.mark) or "?" in (one.mark, other.mark):
        return False
    return one.kind != "file" or one.size == other.size


def unsure(one: Entry, other: Entry) -> bool:
    """Whether only a look at the contents tells."""
    files = one.kind == other.kind == "file"
    return files and (one.mode, one.size) == (other.mode, other.size) and one.mark != other.mark


async def list_files(control: Control, paths: list[str], timeout_s: float) -> dict[str, Entry]:
    """All below the paths, and they themselves.  Raises: TooLarge, MachineFailed, DeadlineExceeded."""
    answer = await control.ask({"manifest": {"paths": paths}}, timeout_s=timeout_s)
    if "too_much" in answer:
        raise TooLarge(f"the sandboxes' files could not be compared: {str(answer['too_much'])[:300]}")
    rows = answer.get("manifest")
    if not isinstance(rows, list) or len(rows) > MAX_ENTRIES:
        raise MachineFailed("a virtual machine told no list of its files")
    return await asyncio.get_running_loop().run_in_executor(None, lambda: dict(read_row(row) for row in rows))


def read_row(row: object) -> tuple[str, Entry]:
    """Decode one row of guest/vm/manifest.py.  Raises: MachineFailed for anything else."""
    if isinstance(row, list) and len(row) == 5:
        path, kind, mode, size, mark = row
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
            and isinstance(mark, str)
            and len(mark) <= MAX_MARK_CHARS
        ):
            return path, Entry(kind, mode, size, mark)
    raise MachineFailed(f"a virtual machine told of a file what cannot be: {row!r:.200}")


async def same_content(before: Control, after: Control, paths: list[str], timeout_s: float) -> frozenset[str]:
    """Those of these files that hold the same, as both say."""
    same: list[str] = []
    for some in portions(paths, lambda path: len(json.dumps(path)), MAX_ORDER_BYTES):
        one, other = await asyncio.gather(*(_told(control, "digests", some, timeout_s) for control in (before, after)))
        same += [path for path in some if path in one and one[path] == other.get(path)]
    return frozenset(same)


async def _told(control: Control, what: str, paths: list[str], timeout_s: float) -> dict[str, str]:
    """Of each path that the machine can say it of, a text."""
    answer = await control.ask({"manifest": {what: paths}}, timeout_s=timeout_s)
    told: Any = answer.get(what)
    if not isinstance(told, Mapping):
        return {}
    return {path: text for path in paths if isinstance(text := told.get(path), str) and len(text) <= TEXT_BYTES}


Item = TypeVar("Item")


def portions(items: Iterable[Item], cost: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """Some at a time, of which each costs at most so much together; one that costs more comes alone."""
    some: list[Item] = []
    total = 0
    for item in items:
        costs = cost(item)
        if some and total + costs > most:
            yield some
            some, total = [], 0
        some.append(item)
        total += costs
    if some:
        yield some


Pair = tuple[Entry | None, Entry | None]


async def _patches(
    before: MicrovmMachine, after: MicrovmMachine, pairs: dict[str, Pair], timeout_s: float
) -> dict[str, str]:
    wanted = list(_with_text(pairs))
    texts: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for side, machine in enumerate((before, after)):
        files = [path for path in wanted if (entry := pairs[path][side]) is not None and entry.kind == "file"]
        size = {path: max(len(path), _size(pairs[path][side]) or 0) + 64 for path in files}
        for some in portions(files, lambda path, size=size: size[path], _TEXTS_AT_ONCE_BYTES):  # type: ignore[misc]
            for few in portions(some, lambda path: len(json.dumps(path)), MAX_ORDER_BYTES):
                texts[side].update(await _told(machine.control, "texts", few, timeout_s))
    rows = []
    for path in wanted:
        sides = [_text(entry, texts[side].get(path)) for side, entry in enumerate(pairs[path])]
        one, other = pairs[path]
        modes = (
            (one.mode, other.mode) if one is not None and other is not None and one.kind == other.kind else (None,) * 2
        )
        if False in sides:
            sides = [None, None]  # no text: its mode at most
        rows.append([path, *sides, *modes])
    return await asyncio.get_running_loop().run_in_executor(None, _run_patches, rows) if rows else {}


def _with_text(pairs: dict[str, Pair]) -> Iterator[str]:
    """The paths whose text is asked for, within the bounds."""
    left = MAX_TEXT_BYTES
    count = 0
    for path, pair in pairs.items():
        sizes = [entry.size for entry in pair if entry is not None and entry.kind in ("file", "link")]
        if len(sizes) < len([entry for entry in pair if entry is not None]) or max(sizes, default=0) > TEXT_BYTES:
            continue
        left -= sum(sizes)
        count += 1
        if left < 0 or count > MAX_PATCHES:
            return
        yield path


def _text(entry: Entry | None, text: str | None) -> str | bool | None:
    """What is compared of one side; None for nothing there, False for what is no text."""
    if entry is None:
        return None
    if entry.kind == "link":
        return entry.mark
    return False if text is None or "\0" in text else text


def _run_patches(rows: list[list[object]]) -> dict[str, str]:
    """In a process of its own, which may take long or fail: then there are none."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(Path(patches.__file__))],
            input=json.dumps(rows), capture_output=True, text=True, check=True, timeout=PATCHES_TIMEOUT_S, env={},
        )  # fmt: skip
        made: dict[str, str] = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
    return made


def _change(one: Entry | None, other: Entry | None, patch: str | None) -> PathChange:
    kind = (other or one or Entry("file", 0, 0, "")).kind
    return PathChange(kind, _size(one), _size(other), patch)


def _size(entry: Entry | None) -> int | None:
    return None if entry is None or entry.size < 0 else entry.size
