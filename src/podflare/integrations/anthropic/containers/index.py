"""What must be known after a restart: which containers there were, which files there are, and whose they are.

One SQLite file, or memory.  Usable by several threads.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

_SCHEMA = """
CREATE TABLE IF NOT EXISTS containers (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, sandbox_id TEXT NOT NULL, daemon TEXT NOT NULL, expires_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, filename TEXT NOT NULL,
    mime_type TEXT NOT NULL, size_bytes INTEGER NOT NULL, created_at REAL NOT NULL, downloadable INTEGER NOT NULL,
    expires_at REAL);
CREATE INDEX IF NOT EXISTS files_of ON files (owner, number);
"""
_FILE = "id, owner, filename, mime_type, size_bytes, created_at, downloadable, expires_at"


@dataclass(frozen=True)
class ContainerRow:
    """A container that was made at some time."""

    id: str
    owner: str
    sandbox_id: str
    daemon: str
    """Address of the daemon that has the sandbox; "" for a private one, which ends with its program."""
    expires_at: float


@dataclass(frozen=True)
class FileRow:
    """A kept file."""

    id: str
    owner: str
    filename: str
    mime_type: str
    size_bytes: int
    created_at: float
    downloadable: bool
    """Whether code made it; what was uploaded is not given back."""
    expires_at: float | None


class Index:
    """The tables.  `path` None keeps them in memory."""

    def __init__(self, path: Path | None = None) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path or ":memory:", check_same_thread=False, isolation_level=None)
        if path is not None:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _query(self, sql: str, values: Iterable[object] = ()) -> Iterator[sqlite3.Cursor]:
        with self._lock:
            yield self._db.execute(sql, tuple(values))

    def keep_container(self, row: ContainerRow) -> None:
        with self._query("INSERT OR REPLACE INTO containers VALUES (?, ?, ?, ?, ?)", astuple(row)):
            pass

    def extend_container(self, container_id: str, expires_at: float) -> None:
        with self._query("UPDATE containers SET expires_at = ? WHERE id = ?", (expires_at, container_id)):
            pass

    def container(self, container_id: str) -> ContainerRow | None:
        with self._query("SELECT * FROM containers WHERE id = ?", (container_id,)) as found:
            row = found.fetchone()
        return None if row is None else ContainerRow(*row)

    def lasting_sandboxes(self) -> list[str]:
        """Ids of the sandboxes that go on without the program that made them, for their daemon is another's."""
        with self._query("SELECT sandbox_id FROM containers WHERE daemon != ''") as found:
            return [str(sandbox_id) for (sandbox_id,) in found]

    def forget_containers(self, before: float) -> None:
        """Drop what expired so long ago that nobody asks for it any more."""
        with self._query("DELETE FROM containers WHERE expires_at < ?", (before,)):
            pass

    def keep_file(self, row: FileRow) -> None:
        with self._query(f"INSERT INTO files ({_FILE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", astuple(row)):
            pass

    def file(self, owner: str, file_id: str) -> FileRow | None:
        with self._query(f"SELECT {_FILE} FROM files WHERE id = ? AND owner = ?", (file_id, owner)) as found:
            row = found.fetchone()
        return None if row is None else _file(row)

    def files(self, owner: str, *, limit: int, after: str | None = None, before: str | None = None) -> list[FileRow]:
        """Newest first.  `after` and `before` are ids in that order; one that is not there is the start of all."""
        where, values = "owner = ?", [owner]
        order = "DESC"
        for other, sign in ((after, "<"), (before, ">")):
            if other is not None:
                where += f" AND number {sign} (SELECT number FROM files WHERE id = ? AND owner = ?)"
                values += [other, owner]
                order = "DESC" if sign == "<" else "ASC"
        sql = f"SELECT {_FILE} FROM files WHERE {where} ORDER BY number {order} LIMIT ?"
        with self._query(sql, (*values, limit)) as found:
            rows = [_file(row) for row in found.fetchall()]
        return rows if order == "DESC" else rows[::-1]

    def bytes_of(self, owner: str) -> int:
        with self._query("SELECT COALESCE(SUM(size_bytes), 0) FROM files WHERE owner = ?", (owner,)) as found:
            return int(found.fetchone()[0])

    def drop_file(self, owner: str, file_id: str) -> bool:
        with self._query("DELETE FROM files WHERE id = ? AND owner = ?", (file_id, owner)) as found:
            return found.rowcount > 0

    def expired_files(self, now: float) -> list[FileRow]:
        with self._query(f"SELECT {_FILE} FROM files WHERE expires_at < ?", (now,)) as found:
            return [_file(row) for row in found.fetchall()]


def _file(row: tuple[str, str, str, str, int, float, int, float | None]) -> FileRow:
    file_id, owner, filename, mime_type, size, created, downloadable, expires = row
    return FileRow(file_id, owner, filename, mime_type, size, created, bool(downloadable), expires)
