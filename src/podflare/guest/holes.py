"""What of a file is no hole: bytes that nobody has written are not read, however many there are (lseek(2))."""

from __future__ import annotations

import errno
import os
from typing import Iterator, Tuple


def next_data(fd: int, offset: int, size: int) -> int:
    """Where the next bytes that are no hole begin; `size` if there are none."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as exc:
        if exc.errno == errno.ENXIO:
            return size
        raise


def parts_with_data(fd: int, size: int, offset: int = 0) -> Iterator[Tuple[int, int]]:
    """(start, end) of what is no hole in the first `size` bytes of a file, from `offset` on."""
    while offset < size:
        start = next_data(fd, offset, size)
        if start >= size:
            return  # a hole up to the end
        offset = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, offset
