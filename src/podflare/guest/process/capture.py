"""Copies a machine's writable layers while it runs: the read-only layer that its forks stack below their own.

Older layers below it can be merged into the copy, so that chains of layers stay short however often is forked.

Runs in a process of the family, on its stage.  User code may change the source meanwhile, so every step goes from
a directory descriptor to a name in it and follows no link.  What vanishes or changes kind on the way is left out.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import contextmanager
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from podflare.guest.descriptors import read_link
from podflare.guest.holes import parts_with_data
from podflare.guest.process.room import Room

MAX_DEPTH = 256
"""Deeper directories are refused: each level holds two descriptors open."""
_FICLONE = 0x40049409
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_GONE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO)
_CHUNK = 1 << 26


def capture_layers(source: str, target: str, room: Room, merged: Sequence[str] = ()) -> None:
    """Copy `source`/<name>/upper to `target`/<name>/upper for each overlay of a machine.

    Args:
        room: for the copy.
        merged: directories of the read-only layers below the machine's own, topmost first, whose content becomes part
            of the copy: their files by hard links.
    Raises: OSError, Outgrown; what was copied so far is the caller's to remove.
    """
    for name in os.listdir(source):
        os.makedirs(f"{target}/{name}", 0o755)
        upper = f"{target}/{name}/upper"
        os.mkdir(upper, 0o755)
        copy = _Copy(upper, room)
        try:
            with _folder(f"{source}/{name}/upper") as folder:
                copy.directory(folder, copy.root, "", 0)
            for layer in merged:
                if os.path.isdir(f"{layer}/{name}/upper"):
                    with _folder(f"{layer}/{name}/upper") as folder:
                        merge_below(folder, copy.root, 0)
            if name != _ROOT and _is_untouched(copy.root):
                os.rmdir(upper)
                os.rmdir(f"{target}/{name}")
        finally:
            os.close(copy.root)


SMALL_ENTRIES = 48
SMALL_BYTES = 1 << 20


def small_room() -> Room:
    """For the copy of what was small a moment ago."""
    return Room(4 * SMALL_ENTRIES, 4 * SMALL_BYTES)


def is_small(source: str) -> bool:
    """Whether copying a machine's layers takes a moment only.  It may grow while it is copied."""
    entries, size = 0, 0
    try:
        folders = [f"{source}/{name}/upper" for name in os.listdir(source)]
        while folders:
            with os.scandir(folders.pop()) as found:
                for entry in found:
                    entries += 1
                    size += entry.stat(follow_symlinks=False).st_size
                    if entries > SMALL_ENTRIES or size > SMALL_BYTES:
                        return False
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
    except OSError:
        return False  # user code changes it at this moment
    return True


_ROOT = "root"
"""The overlay that every machine has at least one layer of: the mode of / is in it."""


def _is_untouched(folder: int) -> bool:
    return stat.S_IMODE(os.fstat(folder).st_mode) == 0o755 and not os.listdir(folder)


@contextmanager
def _folder(path: "str | bytes", within: Optional[int] = None) -> Iterator[int]:
    fd = os.open(path, _DIRECTORY, dir_fd=within)
    try:
        yield fd
    finally:
        os.close(fd)


def merge_below(source: int, target: int, depth: int) -> None:
    """Add to the directory `target` what overlayfs would show of `source` in a layer below it.

    What `target` has hides what `source` has under that name (kernel docs, overlayfs: whiteouts and opaque
    directories); of two directories the content is merged.  Precondition: nobody changes either.
    """
    if depth > MAX_DEPTH:
        raise OSError(errno.ENAMETOOLONG, f"directories nested deeper than {MAX_DEPTH}")
    if _is_opaque(target):
        return
    before = os.fstat(target)
    for name in os.listdir(source):
        below = os.stat(name, dir_fd=source, follow_symlinks=False)
        try:
            above: Optional[os.stat_result] = os.stat(name, dir_fd=target, follow_symlinks=False)
        except FileNotFoundError:
            above = None
        if above is None and not stat.S_ISDIR(below.st_mode):
            os.link(name, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
        elif above is None:
            os.mkdir(name, 0o700, dir_fd=target)
            with _folder(name, source) as theirs, _folder(name, target) as ours:
                merge_below(theirs, ours, depth + 1)
                _copy_attributes(theirs, ours, os.fstat(theirs))
        elif stat.S_ISDIR(above.st_mode):
            with _folder(name, target) as ours:
                if not stat.S_ISDIR(below.st_mode):
                    os.setxattr(ours, _OPAQUE, b"y")  # what is not merged with here hides what lies below it
                    continue
                with _folder(name, source) as theirs:
                    merge_below(theirs, ours, depth + 1)
    if _is_opaque(source):
        os.setxattr(target, _OPAQUE, b"y")
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))


_OPAQUE = "user.overlay.opaque"


def _is_opaque(folder: int) -> bool:
    try:
        return os.getxattr(folder, _OPAQUE) == b"y"
    except OSError:
        return False


class _Copy:
    """One tree on its way."""

    def __init__(self, target: str, room: Room) -> None:
        self.root = os.open(target, _DIRECTORY)
        self._room = room
        self._linked: Dict[Tuple[int, int], str] = {}

    def directory(self, source: int, target: int, path: str, depth: int) -> None:
        """Copy the content of one directory, then its own attributes."""
        if depth > MAX_DEPTH:
            raise OSError(errno.ENAMETOOLONG, f"directories nested deeper than {MAX_DEPTH}: {path[:200]}")
        for name in os.listdir(source):
            try:
                self._entry(source, target, name, f"{path}/{name}", depth)
            except OSError as exc:
                if exc.errno not in _GONE:
                    raise
        _copy_attributes(source, target, os.fstat(source))

    def _entry(self, source: int, target: int, name: str, path: str, depth: int) -> None:
        self._room.take_entry()
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            theirs = os.open(name, _DIRECTORY, dir_fd=source)
            try:
                os.mkdir(name, 0o700, dir_fd=target)
                ours = os.open(name, _DIRECTORY, dir_fd=target)
                try:
                    self.directory(theirs, ours, path, depth + 1)
                finally:
                    os.close(ours)
            finally:
                os.close(theirs)
            return
        key = (status.st_dev, status.st_ino)
        if key in self._linked:
            os.link(self._linked[key], name, src_dir_fd=self.root, dst_dir_fd=target, follow_symlinks=False)
            return
        if stat.S_ISREG(status.st_mode):
            self._file(source, target, name)
        elif stat.S_ISLNK(status.st_mode):
            os.symlink(read_link(name, source), name, dir_fd=target)
            os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
            os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=target, follow_symlinks=False)
        elif stat.S_ISFIFO(status.st_mode) or (stat.S_ISCHR(status.st_mode) and status.st_rdev == 0):
            # A device 0:0 is overlayfs's mark of a deleted name (whiteout).
            os.mknod(name, status.st_mode, 0, dir_fd=target)
            os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
        else:
            return  # a socket: its listener stays with the parent
        if status.st_nlink > 1:
            self._linked[key] = path.lstrip("/")

    def _file(self, source: int, target: int, name: str) -> None:
        theirs = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=source)
        try:
            status = os.fstat(theirs)
            if not stat.S_ISREG(status.st_mode):
                return  # replaced since it was looked at
            ours = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=target)
            try:
                _copy_content(theirs, ours, status.st_size, self._room)
                _copy_attributes(theirs, ours, status)
            finally:
                os.close(ours)
        finally:
            os.close(theirs)


def _copy_content(source: int, target: int, size: int, room: Room) -> None:
    if not size:
        return
    try:
        fcntl.ioctl(target, _FICLONE, source)  # shares the blocks, where the file system can
        return
    except OSError:
        pass
    os.ftruncate(target, size)
    for start, end in parts_with_data(source, size):
        while start < end:
            count = os.copy_file_range(source, target, min(end - start, _CHUNK), start, start)
            if not count:
                return  # made shorter meanwhile
            room.take_bytes(count)
            start += count


def _copy_attributes(source: int, target: int, status: os.stat_result) -> None:
    """Owner, mode, extended attributes (overlayfs keeps its marks there), times; in an order that works."""
    os.fchown(target, status.st_uid, status.st_gid)
    os.fchmod(target, stat.S_IMODE(status.st_mode))
    for key in _attributes(source):
        try:
            os.setxattr(target, key, os.getxattr(source, key))
        except OSError:
            pass  # not ours to set (security.*), or gone
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def _attributes(fd: int) -> List[str]:
    try:
        return os.listxattr(fd)
    except OSError:
        return []
