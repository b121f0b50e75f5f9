"""What is remembered about ids beyond their life: that they were issued, to whom, and why they ended.

`MemoryStore` is for the embedded daemon, whose memory ends with it; `SqliteStore` survives a restart.
Neither knows anything of live sandboxes.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import anyio.to_thread

from podflare.host import telemetry

if TYPE_CHECKING:
    import sqlite3

MEMORY_ROWS = 20_000
SQLITE_ROWS = 1_000_000
"""Oldest ids are forgotten beyond this; about 200 MB."""
PRUNE_EVERY = 10_000
RECORD_WAIT_S = 1.0
RESTARTED = "the daemon that ran it has ended"


@dataclass(frozen=True)
class Issued:
    """One id that was issued once."""

    id: str
    owner: str
    cause: str
    """Why it ended; empty while it lives."""


class Store(Protocol):
    """Remembers ids.  Writes return at once and are in order; a read sees every write before it."""

    def issued(self, sandbox_id: str, owner: str) -> None:
        """An id was handed out."""

    def ended(self, sandbox_id: str, cause: str) -> None:
        """Its sandbox ended."""

    async def recorded(self) -> None:
        """Wait until what was written so far outlives this process, but not for a disk that hangs."""

    async def find(self, sandbox_id: str) -> Issued | None:
        """What is known of an id; None if it was never issued (or so long ago that it is forgotten)."""

    async def aclose(self) -> None:
        """Write what is left.  Idempotent."""


class MemoryStore:
    """Ends with the process."""

    def __init__(self, rows: int = MEMORY_ROWS) -> None:
        self._rows: OrderedDict[str, Issued] = OrderedDict()
        self._cap = rows

    def issued(self, sandbox_id: str, owner: str) -> None:
        self._rows[sandbox_id] = Issued(sandbox_id, owner, "")
        while len(self._rows) > self._cap:
            self._rows.popitem(last=False)

    def ended(self, sandbox_id: str, cause: str) -> None:
        row = self._rows.get(sandbox_id)
        if row is not None:
            self._rows[sandbox_id] = Issued(row.id, row.owner, cause)

    async def recorded(self) -> None:
        return None

    async def find(self, sandbox_id: str) -> Issued | None:
        return self._rows.get(sandbox_id)

    async def aclose(self) -> None:
        return None


_SCHEMA = """
CREATE TABLE IF NOT EXISTS sandboxes (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    instance TEXT NOT NULL,
    issued_at REAL NOT NULL,
    ended_at REAL,
    cause TEXT NOT NULL DEFAULT ''
);
CREATE INDEX IF NOT EXISTS living ON sandboxes (instance) WHERE cause = '';
"""


class SqliteStore:
    """A file in the data directory.  One thread does all its work, so a slow disk blocks nobody."""

    def __init__(self, path: Path, instance: str, living_instances: tuple[str, ...] = ()) -> None:
        """Open or make the file; ids of instances that are neither this nor living are marked as ended.

        Raises: OSError or sqlite3.Error if the file cannot be used.
        """
        import sqlite3

        self._errors: type[Exception] = sqlite3.Error
        self._instance = instance
        self._work: queue.SimpleQueue[tuple[Callable[[], object], Future[object] | None] | None] = queue.SimpleQueue()
        self._since_prune = 0
        # Nobody else's business; SQLite gives the files beside it the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        Path(path).chmod(0o600)
        # autocommit with a write-ahead log: a write costs no disk flush, and a killed daemon loses none of them.
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
            marks = ",".join("?" * (len(living_instances) + 1))
            self._db.execute(
                f"UPDATE sandboxes SET cause = ?, ended_at = ? WHERE cause = '' AND instance NOT IN ({marks})",
                (RESTARTED, time.time(), instance, *living_instances),
            )
        except BaseException:
            self._db.close()
            raise
        self._thread = threading.Thread(target=self._run, name="podflare-store", daemon=True)
        self._thread.start()

    def issued(self, sandbox_id: str, owner: str) -> None:
        row = (sandbox_id, owner, self._instance, time.time())
        self._later("INSERT INTO sandboxes (id, owner, instance, issued_at) VALUES (?, ?, ?, ?)", row)
        self._since_prune += 1
        if self._since_prune >= PRUNE_EVERY:
            self._since_prune = 0
            self._later(
                "DELETE FROM sandboxes WHERE cause != '' AND number <= (SELECT MAX(number) FROM sandboxes) - ?",
                (SQLITE_ROWS,),
            )

    def ended(self, sandbox_id: str, cause: str) -> None:
        self._later("UPDATE sandboxes SET cause = ?, ended_at = ? WHERE id = ?", (cause, time.time(), sandbox_id))

    async def recorded(self) -> None:
        answer: Future[object] = Future()
        self._work.put((lambda: None, answer))
        with anyio.move_on_after(RECORD_WAIT_S):
            # Shielded: the thread could not answer a cancelled future.
            await asyncio.shield(asyncio.wrap_future(answer))

    async def find(self, sandbox_id: str) -> Issued | None:
        def read() -> sqlite3.Row | None:
            found: sqlite3.Row | None = self._db.execute(
                "SELECT id, owner, cause FROM sandboxes WHERE id = ?", (sandbox_id,)
            ).fetchone()
            return found

        answer: Future[object] = Future()
        self._work.put((read, answer))
        row = await anyio.to_thread.run_sync(answer.result, 10.0)
        return Issued(*row) if isinstance(row, tuple) else None

    async def aclose(self) -> None:
        self._work.put(None)
        await anyio.to_thread.run_sync(self._thread.join, 5.0)

    def _later(self, sql: str, values: tuple[object, ...]) -> None:
        self._work.put((lambda: self._db.execute(sql, values), None))

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            work, answer = item
            try:
                result = work()
            except self._errors as exc:
                # A full disk must not end the daemon: what is lost is the reason shown for a sandbox that is gone.
                if answer is not None:
                    answer.set_exception(exc)
                else:
                    telemetry.problem("store write failed", error=exc)
            else:
                if answer is not None:
                    answer.set_result(result)
        self._db.close()
