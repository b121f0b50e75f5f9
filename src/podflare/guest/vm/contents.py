"""Contents of files, told in pieces to whoever merges them into another machine.

Asked for are [path, offset] pairs; told are, in the same order and for as many as fit, [path, size, mtime, extents,
next]: what is not a hole from that offset on, and where to ask on (null at the end).  A file that is gone, or written
to while it is read, has a size of -1.
"""

from __future__ import annotations

import base64
import errno
import os
import stat
from typing import Any, List, Optional, Sequence, Tuple

MAX_BYTES = 768 * 1024
"""Of one answer."""
_PIECE = 256 * 1024
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

Told = List[Any]


def tell(asked: Sequence[Tuple[str, int]]) -> List[Told]:
    """The answer."""
    left, told = MAX_BYTES, []
    for path, offset in asked:
        if left <= 0:
            break
        try:
            row, used = _piece(path, offset, left)
        except OSError:
            row, used = [path, -1, 0, [], None], 0
        left -= used + len(path)
        told.append(row)
    return told


def _piece(path: str, offset: int, most: int) -> Tuple[Told, int]:
    fd = os.open(path, _FILE)
    try:
        before = os.fstat(fd)
        if not stat.S_ISREG(before.st_mode):
            raise OSError(errno.ENXIO, "no file any more")
        extents: List[List[Any]] = []
        size = 0
        at: Optional[int] = offset
        while at is not None and size < most:
            at = _next_data(fd, at, before.st_size)
            if at is not None:
                data = os.pread(fd, min(_PIECE, most - size, _end_of_data(fd, at) - at), at)
                if not data:
                    break  # made shorter: found below
                extents.append([at, base64.b64encode(data).decode()])
                size += len(data)
                at += len(data)
        if at is not None:
            at = _next_data(fd, at, before.st_size)
        after = os.fstat(fd)
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise OSError(errno.ESTALE, "written to")
        return [path, before.st_size, before.st_mtime_ns, extents, at], size
    finally:
        os.close(fd)


def _next_data(fd: int, offset: int, size: int) -> Optional[int]:
    """Where the next bytes that are no hole begin; None if there are none (lseek(2))."""
    if offset >= size:
        return None
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as exc:
        if exc.errno == errno.ENXIO:
            return None
        raise


def _end_of_data(fd: int, offset: int) -> int:
    return os.lseek(fd, offset, os.SEEK_HOLE)
