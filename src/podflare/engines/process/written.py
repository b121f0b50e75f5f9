"""How much lies below a directory, in bytes and in files.

The code whose files these are may be running, and hide and change what it can.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_DEPTH = 1000
"""Of nested directories; a descriptor of the daemon is open for each while it looks."""


@dataclass(frozen=True)
class Written:
    """What lies below a directory."""

    size: int
    """Bytes on disk, hard links once."""
    files: int
    """Inodes: files, directories, links; hard links once."""


class TooDeep(Exception):
    """Directories are nested so deep that they cannot be looked through."""


def measure(root: Path, *, max_files: int) -> Written:
    """What lies below `root`; no further than one file above `max_files`.

    Follows no link, and what vanishes meanwhile counts nothing.
    Raises: TooDeep.
    """
    seen: set[int] = set()
    size = files = 0
    with contextlib.closing(_walk(root)) as entries:
        for status in entries:
            if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
                if status.st_ino in seen:
                    continue
                seen.add(status.st_ino)
            size += status.st_blocks * 512
            files += 1
            if files > max_files:
                break
    return Written(size, files)


class _Folder:
    """An open directory.  Ended by `close`."""

    def __init__(self, descriptor: int, closed_mode: int | None) -> None:
        """Args: closed_mode: the mode to give back to it, which keeps its owner out."""
        self.descriptor = descriptor
        self.below: list[str] = []
        """Subdirectories that are still to be looked through."""
        self._closed_mode = closed_mode

    @classmethod
    def open(cls, name: str, parent: int | None) -> _Folder | None:
        """None if it is gone, or no directory any more."""
        flags = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return cls(os.open(name, os.O_RDONLY | flags, dir_fd=parent), None)
        except PermissionError:
            return cls._open_closed(name, parent, flags)
        except OSError:
            return None

    @classmethod
    def _open_closed(cls, name: str, parent: int | None, flags: int) -> _Folder | None:
        """An ordinary user's own directory whose mode keeps its owner out: that is no place to hide files in."""
        try:
            handle = os.open(name, os.O_PATH | flags, dir_fd=parent)
        except OSError:
            return None
        try:
            mode = stat.S_IMODE(os.fstat(handle).st_mode)
            path = Path(f"/proc/self/fd/{handle}")  # what a descriptor without rights to the content can be changed by
            path.chmod(mode | 0o500)
            return cls(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), mode)
        except OSError:
            return None
        finally:
            os.close(handle)

    def entries(self) -> Iterator[os.stat_result]:
        with os.scandir(self.descriptor) as entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                if stat.S_ISDIR(status.st_mode):
                    self.below.append(entry.name)
                yield status

    def close(self) -> None:
        if self._closed_mode is not None:
            with contextlib.suppress(OSError):
                os.fchmod(self.descriptor, self._closed_mode)
        os.close(self.descriptor)


def _walk(root: Path) -> Generator[os.stat_result, None, None]:
    """By descriptors, not paths: those have a longest length, and links can be put into them."""
    chain: list[_Folder] = []
    try:
        folder = _Folder.open(str(root), None)
        while True:
            if folder is not None:
                chain.append(folder)
                yield from folder.entries()
            while chain and not chain[-1].below:
                chain.pop().close()
            if not chain:
                return
            if len(chain) > MAX_DEPTH:
                raise TooDeep
            folder = _Folder.open(chain[-1].below.pop(), chain[-1].descriptor)
    finally:
        for folder in chain:
            folder.close()
