"""The files that clients upload and that code hands out: content on disk, the rest in the index.

Blocking; callers in an event loop use a thread for content.
"""

from __future__ import annotations

import mimetypes
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from podflare.errors import FileMissing, QuotaExceeded, TooLarge
from podflare.integrations.anthropic.containers.index import FileRow, Index

MAX_FILE_BYTES = 500 * 1024 * 1024
MAX_OWNER_BYTES = 10 * 1024 * 1024 * 1024
MAX_INLINE_BYTES = 32 * 1024 * 1024
"""Of all files whose content goes into a request."""


class FileStore:
    """Files below a directory of its own.  An owner sees its own ones only."""

    def __init__(
        self,
        directory: Path,
        index: Index,
        *,
        max_file_bytes: int = MAX_FILE_BYTES,
        max_owner_bytes: int = MAX_OWNER_BYTES,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.max_file_bytes = max_file_bytes
        self._max_owner_bytes = max_owner_bytes
        self._directory = directory
        self._index = index
        self._now = now
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left in directory.glob("new-*"):
            left.unlink(missing_ok=True)  # of a program that was killed in the middle

    def new_path(self) -> Path:
        """Where to write a file before it is kept.  The caller removes what it does not keep."""
        return self._directory / f"new-{secrets.token_hex(12)}"

    def keep(
        self,
        owner: str,
        path: Path,
        filename: str,
        *,
        mime_type: str | None = None,
        downloadable: bool,
        lifetime_s: float | None = None,
    ) -> FileRow:
        """Take over the file at `path`.

        Raises: TooLarge above the cap of one file; QuotaExceeded above the cap of all files of the owner.
        """
        size = path.stat().st_size
        if size > self.max_file_bytes:
            raise TooLarge(f"a file of {size} bytes, the cap is {self.max_file_bytes}")
        self._drop_expired()
        if self._index.bytes_of(owner) + size > self._max_owner_bytes:
            raise QuotaExceeded(f"files: the cap of all files together is {self._max_owner_bytes} bytes")
        now = self._now()
        kind = mime_type or mimetypes.guess_type(filename)[0] or "application/octet-stream"
        expires_at = None if lifetime_s is None else now + lifetime_s
        name = filename.encode("utf-8", "replace").decode()
        file_id = f"file_{secrets.token_hex(12)}"
        row = FileRow(file_id, owner, name, kind, size, now, downloadable, expires_at)
        path.rename(self._directory / file_id)
        self._index.keep_file(row)
        return row

    def find(self, owner: str, file_id: str) -> FileRow:
        """Raises: FileMissing for an id that this owner does not have, or has no more."""
        row = self._index.file(owner, file_id)
        if row is None or (row.expires_at is not None and row.expires_at < self._now()):
            raise FileMissing(f"File not found: {file_id:.100}")
        return row

    def knows(self, owner: str, file_id: str) -> bool:
        """Whether the owner has this file."""
        try:
            self.find(owner, file_id)
        except FileMissing:
            return False
        return True

    def path_of(self, row: FileRow) -> Path:
        """Where its content is."""
        return self._directory / row.id

    def content(self, row: FileRow) -> bytes:
        """All of it.  Raises: FileMissing if it was deleted meanwhile."""
        try:
            return self.path_of(row).read_bytes()
        except FileNotFoundError as exc:
            raise FileMissing(f"File not found: {row.id}") from exc

    def page(
        self, owner: str, *, limit: int, after: str | None = None, before: str | None = None
    ) -> tuple[list[FileRow], bool]:
        """Files, newest first, and whether there are more in this direction."""
        self._drop_expired()
        rows = self._index.files(owner, limit=limit + 1, after=after, before=before)
        if len(rows) <= limit:
            return rows, False
        return (rows[1:] if before is not None and after is None else rows[:limit]), True

    def delete(self, owner: str, file_id: str) -> None:
        """Raises: FileMissing."""
        row = self.find(owner, file_id)
        self._index.drop_file(owner, row.id)
        self.path_of(row).unlink(missing_ok=True)

    def _drop_expired(self) -> None:
        for row in self._index.expired_files(self._now()):
            self._index.drop_file(row.owner, row.id)
            self.path_of(row).unlink(missing_ok=True)
