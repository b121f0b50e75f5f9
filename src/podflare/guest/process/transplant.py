"""Copies what a machine has at a path, with all below it, into a directory: kind, mode, content, target of links.

Not times, owners, extended attributes, and which files are one by hard links; sockets and devices are left out.
Runs where compare.py does.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager
from typing import Callable, Iterator, List, Optional, Sequence

from podflare.guest.holes import parts_with_data
from podflare.guest.process.compare import MAX_DEPTH, Entry, Layer, resolve
from podflare.guest.process.room import Room
from podflare.guest.process.threeway import UNMERGEABLE, mark_of_status, names_of

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_PIECE = 1 << 22


class Changed(Exception):
    """Running code changed what was to be merged."""


def transplant(
    entry: Entry, target: int, name: str, room: Room, *, path: str, mode: Optional[int] = None, depth: int = 0
) -> None:
    """Copy an entry to `name` in the directory `target`, where nothing is of that name.

    Args:
        room: for the copy.
        mode: of the copy itself, instead of the entry's.
    Raises: OSError; Outgrown; Changed if a file is written to meanwhile.
    """
    room.take_entry()
    if depth > MAX_DEPTH:
        raise OSError(errno.ENAMETOOLONG, f"directories nested deeper than {MAX_DEPTH}: {path[:200]}")
    wanted = entry.mode if mode is None else mode
    if entry.kind == "directory":
        _folder(entry, target, name, room, path, wanted, depth)
    elif entry.kind == "file":
        _file(entry, target, name, room, path, wanted)
    elif entry.kind == "link":
        os.symlink(entry.target(), name, dir_fd=target)
    elif entry.kind not in UNMERGEABLE:
        os.mkfifo(name, wanted, dir_fd=target)


def _folder(entry: Entry, target: int, name: str, room: Room, path: str, mode: int, depth: int) -> None:
    os.mkdir(name, 0o700, dir_fd=target)
    own = os.open(name, DIRECTORY, dir_fd=target)
    try:
        for inner_name in names_of(entry.folders):
            inner = resolve(entry.folders, inner_name)
            if inner is not None:
                try:
                    transplant(inner, own, inner_name, room, path=f"{path}/{inner_name}", depth=depth + 1)
                finally:
                    inner.close()
        os.fchmod(own, mode)
    finally:
        os.close(own)


def _file(entry: Entry, target: int, name: str, room: Room, path: str, mode: int) -> None:
    source = entry.open()
    try:
        status = os.fstat(source)
        if mark_of_status(status, None) != mark_of_status(entry.status, None):
            raise Changed(path)
        own = os.open(name, _NEW_FILE, 0o600, dir_fd=target)
        try:
            copy_bytes(source, own, status.st_size, room)
            os.fchmod(own, mode)
        finally:
            os.close(own)
        if mark_of_status(os.fstat(source), None) != mark_of_status(status, None):
            raise Changed(path)
    finally:
        os.close(source)


def write_file(target: int, name: str, content: bytes, mode: int) -> None:
    """A new file.  Raises: OSError."""
    own = os.open(name, _NEW_FILE, 0o600, dir_fd=target)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(own, rest) :]
        os.fchmod(own, mode)
    finally:
        os.close(own)


def copy_bytes(source: int, target: int, size: int, room: Room) -> None:
    """At most `size` bytes; holes stay holes.  Not copy_file_range: it does not go from one file system to another."""
    os.ftruncate(target, size)
    for start, end in parts_with_data(source, size):
        os.lseek(target, start, os.SEEK_SET)
        while start < end:
            count = os.sendfile(target, source, start, min(end - start, _PIECE))
            if not count:
                return  # made shorter meanwhile
            room.take_bytes(count)
            start += count


@contextmanager
def found(stack: Sequence[Layer], parts: Sequence[str]) -> Iterator[Optional[Entry]]:
    """What a stack shows at a path, for the time of the block; None if nothing."""
    opened: List[Entry] = []
    try:
        entry: Optional[Entry] = None
        for part in parts:
            entry = resolve(stack, part)
            if entry is None:
                break
            opened.append(entry)  # what is in a directory can be read as long as that is open
            stack = entry.folders
        yield entry
    finally:
        for entry in opened:
            entry.close()


def empty(path: str) -> None:
    """Remove all that is in a directory of ours."""
    folder = os.open(path, DIRECTORY)
    try:
        for name in os.listdir(folder):
            remove(folder, name)
    finally:
        os.close(folder)


def open_folder(top: int, parts: Sequence[str], *, make: Optional[Callable[[int, Sequence[str]], None]] = None) -> int:
    """The directory below `top` that these names lead to, through no link.  The caller closes it.

    Args: make: makes one that is not there, in the directory given first; the names up to and with it.
    Raises: OSError.
    """
    folder = os.open(".", DIRECTORY, dir_fd=top)
    try:
        for depth, part in enumerate(parts):
            try:
                inner = os.open(part, DIRECTORY, dir_fd=folder)
            except FileNotFoundError:
                if make is None:
                    raise
                make(folder, parts[: depth + 1])
                inner = os.open(part, DIRECTORY, dir_fd=folder)
            os.close(folder)
            folder = inner
    except BaseException:
        os.close(folder)
        raise
    return folder


def remove(parent: int, name: str) -> None:
    """Remove an entry with all below it.  Follows no link.  Raises: OSError; FileNotFoundError if nothing is there."""
    if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=parent)
        return
    own = os.open(name, DIRECTORY, dir_fd=parent)
    try:
        for inner in os.listdir(own):
            remove(own, inner)
    finally:
        os.close(own)
    os.rmdir(name, dir_fd=parent)
