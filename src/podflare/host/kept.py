"""The whole output of a cell, kept for a while so that it can be fetched although its stream was cut.

A little stays in memory; more goes to an unlinked file, written by a worker thread so that a slow disk never blocks
the event loop.  Disk use is bounded by whoever grants room.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio.to_thread

MEMORY_BYTES = 64 * 1024
"""Below this no file is made: nearly all cells."""
BACKLOG_BYTES = 4 * 1024 * 1024
"""Bytes waiting for the disk from which the source is held."""
_READ_BYTES = 1024 * 1024


class Room:
    """A number of bytes that several holders share."""

    def __init__(self, size: int) -> None:
        self.left = size

    def take(self, wanted: int) -> int:
        """As much of `wanted` as there is."""
        granted = max(0, min(wanted, self.left))
        self.left -= granted
        return granted

    def give_back(self, size: int) -> None:
        self.left += size


class SharedRoom(Room):
    """Room of one sandbox within that of the daemon; makes room by letting the sandbox drop what it kept longest."""

    def __init__(self, size: int, total: Room, drop_oldest: Callable[[], bool]) -> None:
        super().__init__(size)
        self._total = total
        self._drop_oldest = drop_oldest

    def take(self, wanted: int) -> int:
        while self.left < wanted and self._drop_oldest():
            pass
        granted = super().take(wanted)
        got = self._total.take(granted)
        super().give_back(granted - got)
        return got

    def give_back(self, size: int) -> None:
        super().give_back(size)
        self._total.give_back(size)


class KeptOutput:
    """One stream of one cell.  Closed by its owner; bytes above the room it gets are counted, not kept."""

    def __init__(self, directory: Path, rooms: tuple[Room, ...], hold: Callable[[bool], None]) -> None:
        """`hold(True)` asks the source to stop for a while, `hold(False)` ends that."""
        self._directory = directory
        self._rooms = rooms
        self._hold = hold
        self._memory = bytearray()
        self._file = -1
        self._backlog: list[bytes] = []
        self._backlog_bytes = 0
        self._writing: asyncio.Future[None] | None = None
        self._holding = False
        self._closed = False
        self._granted = 0
        self._readers = 0
        self.kept = 0
        """Bytes kept, from the start of the stream."""
        self.cut = False
        """Whether more came than was kept."""

    def append(self, data: bytes) -> None:
        if self._closed or self.cut:
            return
        granted = len(data)
        for index, room in enumerate(self._rooms):
            got = room.take(granted)
            for earlier in self._rooms[:index]:
                earlier.give_back(granted - got)
            granted = got
        if granted < len(data):
            self.cut = True
            data = data[:granted]
        if not data:
            return
        self.kept += len(data)
        self._granted += len(data)
        if self._file < 0 and self.kept <= MEMORY_BYTES:
            self._memory += data
            return
        self._backlog.append(data)
        self._backlog_bytes += len(data)
        if self._backlog_bytes >= BACKLOG_BYTES and not self._holding:
            self._holding = True
            self._hold(True)
        self._write_on()

    def _write_on(self) -> None:
        if self._writing is not None or not self._backlog:
            return
        parts, self._backlog, self._backlog_bytes = self._backlog, [], 0
        if self._file < 0:
            parts.insert(0, bytes(self._memory))
        future = asyncio.get_running_loop().run_in_executor(None, self._write, parts)
        self._writing = future
        future.add_done_callback(self._written)

    def _write(self, parts: list[bytes]) -> None:
        if self._file < 0:
            self._file, name = tempfile.mkstemp(dir=self._directory, prefix="output-")
            Path(name).unlink()
        for part in parts:
            view = memoryview(part)
            while view:
                view = view[os.write(self._file, view) :]

    def _written(self, future: asyncio.Future[None]) -> None:
        self._writing = None
        failure = None if future.cancelled() else future.exception()
        if future.cancelled() or failure is not None:
            # A full disk ends the keeping, not the cell: what is there stays readable.
            self.cut = True
            self._backlog, self._backlog_bytes = [], 0
            self.kept = os.fstat(self._file).st_size if self._file >= 0 else len(self._memory)
        elif self._memory:
            self._memory = bytearray()
        if self._closed:
            self._release_if_done()
            return
        self._write_on()
        if self._holding and self._backlog_bytes < BACKLOG_BYTES:
            self._holding = False
            self._hold(False)

    async def read(self) -> AsyncIterator[bytes]:
        """All that is kept, in pieces.  Bytes that still arrive are part of it until the end is reached once."""
        offset = 0
        self._readers += 1
        try:
            while not self._closed and offset < self.kept:
                if self._writing is not None:
                    await asyncio.wait([self._writing])
                    continue
                if self._file < 0:
                    piece = bytes(self._memory[offset:])
                else:
                    piece = await anyio.to_thread.run_sync(os.pread, self._file, _READ_BYTES, offset)
                if not piece:
                    break
                offset += len(piece)
                yield piece
        finally:
            self._readers -= 1
            self._release_if_done()

    def close(self) -> None:
        """Forget the output and give its room back.  Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._holding:
            self._holding = False
            self._hold(False)
        for room in self._rooms:
            room.give_back(self._granted)
        self._release_if_done()

    def _release_if_done(self) -> None:
        # A worker thread that still uses the descriptor must never see its number reused.
        if not self._closed or self._writing is not None or self._readers:
            return
        self._memory = bytearray()
        self._backlog = []
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
