"""Machines kept on disk under a name: there as a whole or not at all, also after a crash, and for later daemons, too.

One directory each, with the engine's own files and about.json.  Knows of machines only what is told about them.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from podflare.engines.base import Limits, MachineSpec, Snapshot
from podflare.engines.linux.ending import remove_tree
from podflare.engines.templates.store import check_owner
from podflare.errors import BadRequest, Conflict, MachineFailed

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_FORMAT = 2
_ABOUT = "about.json"


@dataclass(frozen=True)
class Kept:
    """A snapshot with its files."""

    about: Snapshot
    folder: Path
    more: Mapping[str, Any]
    """What the engine noted of it."""


class Keeping:
    """A snapshot that is being made: `folder` is to be filled."""

    def __init__(self, folder: Path, final: Path) -> None:
        self.folder = folder
        self._final = final
        self.published = False

    def publish(self, spec: MachineSpec, note: Mapping[str, Any], more: Mapping[str, Any]) -> None:
        """From now on it is there, whatever happens to the computer.  Blocks.

        Raises: Conflict if the name was taken meanwhile; OSError.
        """
        files = [path for path in self.folder.rglob("*") if stat.S_ISREG(path.lstat().st_mode)]
        # What has other names belongs to others: the image's root.
        size = sum(status.st_blocks * 512 for path in files if (status := path.lstat()).st_nlink == 1)
        # A way out is not kept: who goes on from here is told anew what it may reach.
        body = {
            "format": _FORMAT,
            "spec": asdict(replace(spec, uplink=None)),
            "created_at_ms": time.time_ns() // 1_000_000,
            "size_bytes": size,
            "note": dict(note),
            "more": dict(more),
        }
        about = self.folder / _ABOUT
        about.write_text(json.dumps(body))
        for path in (*files, about, self.folder):
            _sync(path)
        try:
            self.folder.rename(self._final)
        except OSError as exc:
            raise Conflict(f"there is a snapshot {self._final.name!r} already") from exc
        self.published = True
        _sync(self._final.parent)


class SnapshotStore:
    """The snapshots below one directory, which need not exist."""

    def __init__(self, folder: str, scratch: Path) -> None:
        """Args:
        folder: empty: none can be kept.
        scratch: of this daemon's life, on the same file system; what is half made or half removed is there, and goes
            with it.
        """
        self._folder = Path(folder) if folder else None
        self._scratch = scratch

    @property
    def names(self) -> tuple[str, ...]:
        try:
            found = [] if self._folder is None else [path.name for path in self._folder.iterdir()]
        except OSError:
            return ()
        return tuple(sorted(name for name in found if _NAME.fullmatch(name)))

    @contextmanager
    def keeping(self, name: str) -> Iterator[Keeping]:
        """A snapshot to be filled and published within the block; if that fails, nothing of it is left.

        Raises: BadRequest for a name that cannot be one; Conflict if it is taken; OSError.
        """
        if self._folder is None:
            raise BadRequest("this daemon keeps no snapshots: it has no directory for them")
        if not _NAME.fullmatch(name):
            raise BadRequest(f"{name!r:.80} is no name: 1 to 64 letters, digits, '_', '.', '-', no sign first")
        if name in self.names:
            raise Conflict(f"there is a snapshot {name!r} already")
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = Keeping(self._scratch / f"keeping-{secrets.token_hex(8)}", self._folder / name)
        made.folder.mkdir(mode=0o700)
        try:
            yield made
        except BaseException:
            if made.published:
                self.remove(name)
            raise
        finally:
            if made.folder.exists():
                remove_tree(made.folder)

    def get(self, name: str) -> Kept:
        """Blocks.  Raises: BadRequest if there is none; MachineFailed if it is damaged."""
        folder = self._existing(name)
        try:
            check_owner(folder)
            body: dict[str, Any] = json.loads((folder / _ABOUT).read_text())
            if body["format"] != _FORMAT:
                raise ValueError(f"its format is {body['format']!r:.20}, this version's is {_FORMAT}")
            spec = body["spec"]
            machine = MachineSpec(spec["template"], Limits(**spec["limits"]), spec["hostname"])
            about = Snapshot(name, machine, body["created_at_ms"], body["size_bytes"], dict(body["note"]))
            return Kept(about, folder, dict(body["more"]))
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise MachineFailed(f"snapshot {name!r} cannot be used: {exc}") from exc

    def remove(self, name: str) -> None:
        """Blocks.  Raises: BadRequest if there is none."""
        going = self._scratch / f"removing-{secrets.token_hex(8)}"
        self._existing(name).rename(going)
        remove_tree(going)

    def _existing(self, name: str) -> Path:
        if self._folder is None or name not in self.names:
            raise BadRequest(f"no snapshot {name!r:.80}; there is: {', '.join(self.names) or 'none'}")
        return self._folder / name


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
