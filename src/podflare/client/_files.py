"""File content on this side: which argument is the content, and its bytes in pieces of constant memory."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import anyio.to_thread

CHUNK_BYTES = 1024 * 1024

Content: TypeAlias = bytes | bytearray | memoryview
LocalPath: TypeAlias = "str | os.PathLike[str]"
_BYTES = (bytes, bytearray, memoryview)


def order_upload(first: Content | LocalPath, second: Content | LocalPath) -> tuple[Content | LocalPath, str]:
    """(content or local path, path in the sandbox) from the two arguments of `upload`.

    Source first, destination second; content given second, as some documentation of the hosted service
    shows it, is told from its type.
    Raises: TypeError for anything else.
    """
    if isinstance(second, _BYTES) and isinstance(first, (str, os.PathLike)):
        first, second = second, first
    if isinstance(second, os.PathLike):
        second = os.fspath(second)
    if isinstance(first, (*_BYTES, str, os.PathLike)) and isinstance(second, str):
        return first, second
    raise TypeError(
        "upload(source, remote_path): source is bytes or the path of a local file, remote_path a str; "
        f"got {type(first).__name__} and {type(second).__name__}"
    )


@dataclass
class Source:
    """Content to send: its size if known, and its pieces, once."""

    size_bytes: int | None
    _view: memoryview | None = None
    _file: BinaryIO | None = None

    def pieces_sync(self) -> Iterator[bytes]:
        """Raises: OSError if the file cannot be read, or is not of the promised size any more."""
        if self._file is None:
            yield from self._slices()
            return
        sent = 0
        while piece := self._file.read(self._next_bytes(sent)):
            sent += len(piece)
            yield piece
        self._check_sent(sent)

    async def pieces_async(self) -> AsyncIterator[bytes]:
        """Raises: as `pieces_sync`."""
        if self._file is None:
            for piece in self._slices():
                yield piece
            return
        sent = 0
        while piece := await anyio.to_thread.run_sync(self._file.read, self._next_bytes(sent)):
            sent += len(piece)
            yield piece
        self._check_sent(sent)

    def _next_bytes(self, sent: int) -> int:
        # What is appended meanwhile is not part of what was promised.
        return CHUNK_BYTES if self.size_bytes is None else min(CHUNK_BYTES, self.size_bytes - sent)

    def _check_sent(self, sent: int) -> None:
        if self.size_bytes is not None and sent != self.size_bytes:
            raise OSError(f"upload failed: the local file shrank from {self.size_bytes} to {sent} bytes meanwhile")

    def _slices(self) -> Iterator[bytes]:
        view = self._view if self._view is not None else memoryview(b"")
        for start in range(0, len(view), CHUNK_BYTES):
            yield bytes(view[start : start + CHUNK_BYTES])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def open_source(content: Content | LocalPath) -> Source:
    """The caller closes it.  Raises: OSError if the local file cannot be read."""
    if isinstance(content, _BYTES):
        view = memoryview(content).cast("B")
        return Source(len(view), _view=view)
    file = open(content, "rb", buffering=0)  # noqa: SIM115  # Source.close closes it
    info = os.fstat(file.fileno())
    # A size that is promised must be sent: only regular files keep one.
    return Source(info.st_size if stat.S_ISREG(info.st_mode) else None, _file=file)


class Target:
    """A local file that appears under its name whole or not at all."""

    def __init__(self, path: LocalPath) -> None:
        """Raises: OSError if nothing can be written beside `path`."""
        self._path = Path(path)
        self._temporary = self._path.with_name(f".{self._path.name}.{secrets.token_hex(6)}")
        self._file = open(self._temporary, "xb")  # noqa: SIM115  # `close` closes it
        self.size_bytes = 0

    def write(self, piece: bytes) -> None:
        self._file.write(piece)
        self.size_bytes += len(piece)

    def keep(self) -> None:
        """The content is complete: give it its name."""
        self._file.close()
        self._temporary.replace(self._path)

    def close(self) -> None:
        """Remove what was not kept.  Idempotent."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)
