"""Contents of files, told in pieces to whoever merges them into another machine.

Asked for are [path, offset] pairs; told are, in the same order and for as many as fit, [path, size, mtime, extents,
next]: what is not a hole from that offset on, and where to ask on (null at the end).  A file that is gone, or written
to while it is read, has a size of -1.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import stat
from typing import List, Optional, Sequence, Tuple

from podflare.guest.holes import parts_with_data

MAX_BYTES = 768 * 1024
"""Of one answer."""
_PIECE = 256 * 1024
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def line(number: int, asked: Sequence[Tuple[str, int]]) -> bytes:
    """The line of the answer to this order.

    Put together by hand: where instructions are translated, looking for what has to be escaped takes longer than all
    the rest.
    """
    left, told = MAX_BYTES, []
    for path, offset in asked:
        if left <= 0:
            break
        try:
            row, used = _piece(path, offset, left)
        except OSError:
            row, used = _row(path, -1, 0, [], None), 0
        left -= used + len(path)
        told.append(row)
    return b'{"contents": [%s], "order": %d}\n' % (b", ".join(told), number)


def _row(path: str, size: int, mtime_ns: int, extents: Sequence[Tuple[int, bytes]], following: Optional[int]) -> bytes:
    pairs = b", ".join(b'[%d, "%s"]' % (at, data) for at, data in extents)
    end = b"null" if following is None else b"%d" % following
    return b"[%s, %d, %d, [%s], %s]" % (json.dumps(path).encode(), size, mtime_ns, pairs, end)


def _piece(path: str, offset: int, most: int) -> Tuple[bytes, int]:
    fd = os.open(path, _FILE)
    try:
        before = os.fstat(fd)
        if not stat.S_ISREG(before.st_mode):
            raise OSError(errno.ENXIO, "no file any more")
        extents: List[Tuple[int, bytes]] = []
        size = 0
        following: Optional[int] = None
        for start, end in parts_with_data(fd, before.st_size, offset):
            while start < end and size < most:
                data = os.pread(fd, min(_PIECE, most - size, end - start), start)
                if not data:
                    break  # made shorter: found below
                extents.append((start, base64.b64encode(data)))
                size += len(data)
                start += len(data)
            if start < end:
                following = start
                break
        after = os.fstat(fd)
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise OSError(errno.ESTALE, "written to")
        return _row(path, before.st_size, before.st_mtime_ns, extents, following), size
    finally:
        os.close(fd)
