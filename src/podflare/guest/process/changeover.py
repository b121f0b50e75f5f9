"""Carries a merge out in a living machine's files: beside them first, then by renames, each of which can be undone.

Runs in a process that has joined the machine's mount namespace, so its root directory is the machine's and links
lead nowhere else.  Running code of the machine may change anything at any moment; every step goes from a directory
descriptor to a name in it, and what comes away is compared with what the plan was made for.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager
from functools import partial
from typing import Callable, Dict, Iterator, List, Sequence, Tuple

from podflare.guest import syscalls as sc
from podflare.guest.descriptors import read_link
from podflare.guest.process.mergebase import Places
from podflare.guest.process.room import Room
from podflare.guest.process.threeway import Action, Mark, mark_of_status
from podflare.guest.process.transplant import DIRECTORY, Changed, found, open_folder, remove, transplant, write_file

_STRANGE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EEXIST, errno.ENOTEMPTY, errno.EXDEV, errno.ENXIO)
"""What a name says that is not what it was when the plan was made."""


class Changeover:
    """One merge: `prepare`, `apply`, then `finish`, or `undo` and `finish`."""

    def __init__(self, mounts: Dict[str, str]) -> None:
        """Args: mounts: where each overlay is mounted in the machine."""
        self._mounts = mounts
        self._root = os.open("/", DIRECTORY)
        self._name = f".podflare-merge-{os.urandom(8).hex()}"
        self._beside: Dict[str, int] = {}
        """For each overlay a directory in it, as only within one a rename is possible."""
        self._staged: List[Tuple[str, Action]] = []
        self._undo: List[Callable[[], None]] = []
        self._count = 0
        self._problems: List[str] = []

    def prepare(self, overlay: str, action: Action, theirs: Places, room: Room) -> None:
        """Put what is to come beside.  Raises: OSError; Changed; Outgrown."""
        name = f"{len(self._staged)}"
        if action.content is not None and action.mode is not None:
            write_file(self._side(overlay), name, action.content, action.mode)
        elif action.take:
            with found(theirs.stack(overlay), _parts(action.path[len(self._mounts[overlay].rstrip("/")) :])) as entry:
                if entry is not None:
                    transplant(entry, self._side(overlay), name, room, path=action.path, mode=action.mode)
        self._staged.append((overlay, action))

    def _side(self, overlay: str) -> int:
        if overlay not in self._beside:
            parent = self._open(_parts(self._mounts[overlay]))
            try:
                os.mkdir(self._name, 0o700, dir_fd=parent)
                self._beside[overlay] = os.open(self._name, DIRECTORY, dir_fd=parent)
            finally:
                os.close(parent)
        return self._beside[overlay]

    def apply(self) -> None:
        """Do all of it.  Raises: OSError; Changed; then `undo` is called."""
        for number, (overlay, action) in enumerate(self._staged):
            try:
                for path, mark in action.removals:
                    self._drop(overlay, path, mark)
                self._put(overlay, action, f"{number}")
            except OSError as exc:
                if exc.errno in _STRANGE:
                    raise Changed(action.path) from exc
                raise

    def _put(self, overlay: str, action: Action, staged: str) -> None:
        path, comes = action.path, action.content is not None or (action.take and self._is_staged(overlay, staged))
        with self._folder(path, make=comes) as (folder, name):
            if not comes:
                if action.take:
                    self._take_away(overlay, path, folder, name, action.mark)
                elif action.mode is not None:
                    if _mark_at(folder, name) != action.mark:
                        raise Changed(path)
                    before = _set_mode(folder, name, action.mode)
                    self._undo.append(lambda: self._set_mode_again(path, before))
                return
            side = self._side(overlay)
            sc.rename(staged, side, name, folder, exchange=action.mark is not None)
            self._undo.append(lambda: self._back(overlay, path, staged, exchange=action.mark is not None))
            if action.mark is not None and _mark_at(side, staged) != action.mark:
                raise Changed(path)

    def _is_staged(self, overlay: str, name: str) -> bool:
        return overlay in self._beside and _mark_at(self._beside[overlay], name) is not None

    def _drop(self, overlay: str, path: str, mark: Mark) -> None:
        with self._folder(path) as (folder, name):
            if mark != ("directory",):
                self._take_away(overlay, path, folder, name, mark)
                return
            mode = stat.S_IMODE(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
            os.rmdir(name, dir_fd=folder)
            self._undo.append(lambda: self._make_again(path, mode))

    def _take_away(self, overlay: str, path: str, folder: int, name: str, mark: Mark) -> None:
        if mark is None:
            return
        side, old = self._side(overlay), f"old{self._count}"
        self._count += 1
        sc.rename(name, folder, old, side)
        self._undo.append(lambda: self._restore(overlay, path, old))
        if _mark_at(side, old) != mark:
            raise Changed(path)

    # What undoes: each opens its directory anew, for that may have been removed and made again.

    def _back(self, overlay: str, path: str, staged: str, *, exchange: bool) -> None:
        with self._folder(path) as (folder, name):
            if exchange:
                sc.rename(staged, self._side(overlay), name, folder, exchange=True)
                return
            try:
                sc.rename(name, folder, staged, self._side(overlay))
            except FileNotFoundError:
                pass  # running code has removed what came

    def _restore(self, overlay: str, path: str, old: str) -> None:
        with self._folder(path) as (folder, name):
            sc.rename(old, self._side(overlay), name, folder)

    def _make_again(self, path: str, mode: int) -> None:
        with self._folder(path) as (folder, name):
            os.mkdir(name, 0o700, dir_fd=folder)
            _set_mode(folder, name, mode)

    def _unmake(self, path: str) -> None:
        with self._folder(path) as (folder, name):
            try:
                os.rmdir(name, dir_fd=folder)
            except OSError as exc:
                if exc.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                    raise  # else running code has removed it, or uses it

    def _set_mode_again(self, path: str, mode: int) -> None:
        with self._folder(path) as (folder, name):
            _set_mode(folder, name, mode)

    @contextmanager
    def _folder(self, path: str, *, make: bool = False) -> Iterator[Tuple[int, str]]:
        """The directory that a path is in, and the name there.  Args: make: directories that are not there."""
        parts = _parts(path)
        folder = self._open(parts[:-1], make=make)
        try:
            yield folder, parts[-1]
        finally:
            os.close(folder)

    def _open(self, parts: Sequence[str], *, make: bool = False) -> int:
        """A directory, by a path without links."""
        return open_folder(self._root, parts, make=self._make_folder if make else None)

    def _make_folder(self, folder: int, parts: Sequence[str]) -> None:
        os.mkdir(parts[-1], 0o755, dir_fd=folder)
        self._undo.append(partial(self._unmake, "/".join(parts)))

    def undo(self) -> List[str]:
        """Take back what was done, the latest first.  Returns what could not be, in words.

        Only running code that is in the way can hinder it; what was to come back then stays beside.
        """
        while self._undo:
            step = self._undo.pop()
            try:
                step()
            except OSError as exc:
                self._problems.append(f"{exc}; what was there is in {self._name} at the top of its file system")
        return self._problems

    def finish(self) -> None:
        """Remove what lies beside, if nothing of it is to come back.  Running code may be in the way; then it stays."""
        for overlay, fd in self._beside.items():
            os.close(fd)
            if self._problems:
                continue
            try:
                parent = self._open(_parts(self._mounts[overlay]))
                try:
                    remove(parent, self._name)
                finally:
                    os.close(parent)
            except (OSError, RecursionError):
                continue
        self._beside = {}


def _mark_at(folder: int, name: str) -> Mark:
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        target = read_link(name, folder) if stat.S_ISLNK(status.st_mode) else None
    except OSError as exc:
        if exc.errno in _STRANGE:
            return None
        raise
    return mark_of_status(status, target)


def _set_mode(folder: int, name: str, mode: int) -> int:
    """Returns: the mode that it had."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        before = stat.S_IMODE(os.fstat(fd).st_mode)
        os.fchmod(fd, mode)
        return before
    finally:
        os.close(fd)


def _parts(path: str) -> List[str]:
    return [part for part in path.split("/") if part]
