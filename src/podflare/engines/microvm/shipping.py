"""Files on their way from one virtual machine into another: read in pieces, checked, put where a merge is planned.

What the machines say is hostile.  A path is only ever one that was in a list that has been checked (diff.read_row), and
it is taken for a name in a place of the receiver's that nothing else is in (guest/vm/staging.py).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import anyio

from podflare.engines import merging
from podflare.engines.linux.waiting import to_the_end
from podflare.engines.microvm.came import Came, Piece
from podflare.engines.microvm.control import Control
from podflare.engines.microvm.diff import MAX_ORDER_BYTES, MAX_SIZE, portions
from podflare.engines.microvm.planned import printable
from podflare.engines.microvm.trio import LayerRows
from podflare.errors import Conflict, MachineFailed, PodflareError, TooLarge

ORDER_BYTES = 1 << 20
"""Of one order with rows or contents; half of what the guest takes (guest/vm/control.py)."""
MAX_EXTENTS = 10_000
MAX_ERROR_CHARS = 500
_BATCH_BYTES = 512 * 1024
_NUMBERS_BYTES = 64
_MAX_TIME_NS = 1 << 62
_ROOM = "may write more than is free on its disk for a merge (rootfs_gb): it takes twice what comes over"


class Merger:
    """The process in the receiving machine that merges (guest/vm/merging.py), as the engine speaks with it."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self.begun = False

    async def ask(self, order: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Give one order.  Raises: as `failure`; as Control.ask."""
        self.begun = True
        answer = await self._control.ask({"merge": order}, timeout_s=timeout_s)
        if "problem" in answer:
            raise failure(answer["problem"])
        return answer

    async def put(self, layer: str, rows: LayerRows, *, timeout_s: float) -> None:
        """Rows of a layer, but no contents."""
        told = {
            path: [path, "nothing", 0, None]
            if row is None
            else [path, row.kind, row.mode, row.mark if row.kind == "link" else None]
            for path, row in rows.items()
        }
        for some in portions(told, lambda path: len(json.dumps(told[path])), ORDER_BYTES):
            await self.ask({"put": {"layer": layer, "rows": [told[path] for path in some]}}, timeout_s=timeout_s)

    async def write(self, layer: str, pieces: Sequence[Piece], *, timeout_s: float) -> None:
        """Contents of a layer's files."""
        for some in portions(pieces, _cost, ORDER_BYTES):
            told = [
                [one.path, one.size, one.mtime_ns, [[at, base64.b64encode(data).decode()] for at, data in one.extents]]
                for one in some
            ]
            await self.ask({"write": {"layer": layer, "pieces": told}}, timeout_s=timeout_s)

    async def check(self, marks: Mapping[str, str], *, timeout_s: float) -> None:
        """Raises: Conflict if one of the machine's files has another mark by now."""
        for some in portions(marks, lambda path: len(json.dumps([path, marks[path]])), ORDER_BYTES):
            await self.ask({"check": [[path, marks[path]] for path in some]}, timeout_s=timeout_s)

    async def decide(self, decisions: Mapping[str, str], *, timeout_s: float) -> None:
        for some in portions(decisions, lambda path: len(json.dumps(path)) + 12, ORDER_BYTES):
            await self.ask({"decide": {path: decisions[path] for path in some}}, timeout_s=timeout_s)

    async def end(self, *, timeout_s: float) -> None:
        """What was not kept is undone.  Idempotent.  Raises: as Control.ask."""
        begun, self.begun = self.begun, False
        if begun:
            await self._control.ask({"merge": {"end": True}}, timeout_s=timeout_s)


def failure(problem: object) -> PodflareError:
    """What a machine says of a merge that failed in it."""
    told = problem if isinstance(problem, dict) else {}
    kind = told.get("kind")
    if kind == "full":
        return TooLarge(f"the sandbox {_ROOM}")
    return merging.failure(printable(str(told.get("error")), MAX_ERROR_CHARS), kind)


def _cost(piece: Piece) -> int:
    """Bytes of it in an order, about."""
    return len(json.dumps(piece.path)) + sum(len(data) * 4 // 3 + _NUMBERS_BYTES for _, data in piece.extents)


class Sized:
    """How much may still come."""

    def __init__(self, most: int) -> None:
        self._most = self._left = most

    def take(self, piece: Piece) -> None:
        """Raises: TooLarge."""
        self._left -= sum(len(data) for _, data in piece.extents)
        if self._left < 0:
            raise TooLarge(f"the files to merge have more than {self._most >> 20} MiB: the sandbox {_ROOM}")


async def pieces_of(control: Control, paths: Iterable[str], *, timeout_s: float) -> AsyncIterator[list[Piece]]:
    """All contents of a machine's files, so many at a time as one answer has.

    Raises: Conflict if one is changed meanwhile; MachineFailed for what is no answer.
    """
    for some in portions(paths, lambda path: len(json.dumps(path)) + 24, MAX_ORDER_BYTES):
        asked: list[tuple[str, int]] = [(path, 0) for path in some]
        known: dict[str, tuple[int, int]] = {}
        while asked:
            answer = await control.ask({"manifest": {"contents": asked}}, timeout_s=timeout_s)
            told, asked = read_contents(answer.get("contents"), asked)
            for piece in told:
                if known.setdefault(piece.path, (piece.size, piece.mtime_ns)) != (piece.size, piece.mtime_ns):
                    raise _changed(piece.path)
            yield told


def read_contents(told: object, asked: Sequence[tuple[str, int]]) -> tuple[list[Piece], list[tuple[str, int]]]:
    """Decode one answer of guest/vm/contents.py.  Returns: what came, and what is still to be asked for.

    Raises: Conflict if a file was changed; MachineFailed for what is no answer.
    """
    if not isinstance(told, list) or not 0 < len(told) <= len(asked):
        raise MachineFailed("a virtual machine told no contents of its files")
    pieces: list[Piece] = []
    more: list[tuple[str, int]] = []
    for row, (path, offset) in zip(told, asked, strict=False):
        if not (isinstance(row, list) and len(row) == 5 and row[0] == path):
            raise MachineFailed("a virtual machine told contents of a file that it was not asked for")
        _, size, mtime_ns, extents, following = row
        if size == -1:
            raise _changed(path)
        if not (
            _is_number(size, MAX_SIZE) and _is_number(abs(mtime_ns) if type(mtime_ns) is int else -1, _MAX_TIME_NS)
        ):
            raise MachineFailed("a virtual machine told of a file what cannot be")
        found = _extents(extents, offset, size)
        pieces.append(Piece(path, size, mtime_ns, found))
        if following is not None:
            # Each answer gets on, or it would be asked without end.
            if not (found and _is_number(following, size) and following >= found[-1][0] + len(found[-1][1])):
                raise MachineFailed("a virtual machine told of a file what cannot be")
            more.append((path, following))
    return pieces, [*more, *asked[len(told) :]]


def _extents(told: object, offset: int, size: int) -> tuple[tuple[int, bytes], ...]:
    found: list[tuple[int, bytes]] = []
    if isinstance(told, list) and len(told) <= MAX_EXTENTS:
        for pair in told:
            if not (
                isinstance(pair, list) and len(pair) == 2 and _is_number(pair[0], size) and isinstance(pair[1], str)
            ):
                break
            try:
                data = base64.b64decode(pair[1], validate=True)
            except (binascii.Error, ValueError):
                break
            if pair[0] < offset or not data or pair[0] + len(data) > size:
                break
            found.append((pair[0], data))
            offset = pair[0] + len(data)
        else:
            return tuple(found)
    raise MachineFailed("a virtual machine told of a file what cannot be")


def _is_number(value: object, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _changed(path: str) -> Conflict:
    return Conflict(f"{path[:500]!r} was changed by running code while it was merged; nothing has changed, try again")


async def pieces_kept(came: Came, paths: Sequence[str]) -> AsyncIterator[list[Piece]]:
    """The same of what came over in an earlier merge.  Raises: OSError."""
    pieces = (piece for path in paths for piece in came.pieces(path))
    # To the end: its descriptor is not closed under a thread that reads from it.
    while found := await to_the_end(_some(pieces)):
        yield found


async def _some(pieces: Iterator[Piece]) -> list[Piece]:
    return await asyncio.get_running_loop().run_in_executor(None, _take, pieces)


def _take(pieces: Iterator[Piece]) -> list[Piece]:
    """So many as one order has, and none at the end."""
    found: list[Piece] = []
    size = 0
    for piece in pieces:
        found.append(piece)
        size += len(piece.path) + sum(len(data) for _, data in piece.extents) + _NUMBERS_BYTES
        if size >= _BATCH_BYTES:
            break
    return found


async def ahead(pieces: AsyncIterator[list[Piece]]) -> AsyncGenerator[list[Piece], None]:
    """The same, each of which is fetched while the one before is dealt with."""
    coming = asyncio.ensure_future(anext(pieces, None))
    try:
        while (found := await coming) is not None:
            coming = asyncio.ensure_future(anext(pieces, None))
            yield found
    finally:
        coming.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.wait([coming])
