"""What came over in merges of two machines, kept on disk: over what both once were, that is their next base.

A folder with the rows of a layer and the contents of its files.  All of it is a guest's word and hostile: bytes are
passed on, never looked into.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field
from pathlib import Path

from podflare.engines.microvm.diff import Entry
from podflare.engines.microvm.trio import LayerRows, below_any, hiding

PIECE_BYTES = 256 * 1024
_ROWS, _DATA = "rows.json", "data"
_KEPT_KINDS = ("file", "directory", "link", "fifo")


@dataclass(frozen=True)
class Piece:
    """Of a file's content."""

    path: str
    size: int
    mtime_ns: int
    extents: tuple[tuple[int, bytes], ...]
    """(offset, data): what is neither in these nor in those of other pieces is a hole."""


@dataclass
class Content:
    """Of a file: where what is no hole lies in the folder's data."""

    size: int
    mtime_ns: int
    extents: list[tuple[int, int, int]] = field(default_factory=list)
    """(offset in the file, length, offset in the data)."""


class Came:
    """One such folder, to be read; closed by `close`."""

    def __init__(self, folder: Path) -> None:
        """Blocks.  Raises: OSError."""
        body = json.loads((folder / _ROWS).read_text())
        self.rows: dict[str, Entry | None] = {
            path: None if entry is None else Entry(*entry) for path, entry in body["rows"]
        }
        self.hides = frozenset(body["hides"])
        """Directories below which nothing of what lies under this layer is shown."""
        self.contents = {path: Content(*content) for path, content in body["contents"].items()}
        self._data = os.open(folder / _DATA, os.O_RDONLY | os.O_CLOEXEC)

    def pieces(self, path: str) -> Iterator[Piece]:
        """Of one of its files.  Blocks.  Raises: OSError."""
        content = self.contents[path]
        yield Piece(path, content.size, content.mtime_ns, ())
        for offset, length, at in content.extents:
            for start in range(0, length, PIECE_BYTES):
                data = os.pread(self._data, min(PIECE_BYTES, length - start), at + start)
                yield Piece(path, content.size, content.mtime_ns, ((offset + start, data),))

    def close(self) -> None:
        fd, self._data = self._data, -1
        if fd >= 0:
            os.close(fd)


class Coming:
    """One that is being written: pieces as they come, then `finish`.  Closed by `close`."""

    def __init__(self, folder: Path) -> None:
        """Args: folder: exists.  Raises: OSError."""
        self._folder = folder
        self._data = os.open(folder / _DATA, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._size = 0
        self._contents: dict[str, Content] = {}

    def add(self, piece: Piece) -> None:
        """Blocks.  Raises: OSError."""
        content = self._contents.setdefault(piece.path, Content(piece.size, piece.mtime_ns))
        for offset, data in piece.extents:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._data, rest) :]
            content.extents.append((offset, len(data), self._size))
            self._size += len(data)

    def finish(self, layer: LayerRows, former: Came | None) -> None:
        """Write it down, over what an earlier merge of the two has left.  Blocks.  Raises: OSError."""
        rows = {path: entry for path, entry in layer.items() if entry is None or entry.kind in _KEPT_KINDS}
        hides: set[str] = set()
        if former is not None:
            hides = {*former.hides, *hiding(former.rows)}
            own = hiding(rows)
            older = {path: row for path, row in former.rows.items() if path not in rows and not below_any(path, own)}
            for path, entry in older.items():
                if entry is not None and entry.kind == "file":
                    for piece in former.pieces(path):
                        self.add(piece)
            rows |= older
        body = {
            "rows": [(path, None if row is None else astuple(row)) for path, row in sorted(rows.items())],
            "hides": sorted(hides),
            "contents": {path: astuple(self._contents[path]) for path in self._contents if path in rows},
        }
        (self._folder / _ROWS).write_text(json.dumps(body))

    def close(self) -> None:
        fd, self._data = self._data, -1
        if fd >= 0:
            os.close(fd)
