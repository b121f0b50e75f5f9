"""Closing what a forked process has inherited and must not keep."""

from __future__ import annotations

import errno
import os
from typing import Collection

from podflare.guest import syscalls as sc

_LAST = 0xFFFFFFFF


def read_link(name: str, folder: int) -> str:
    """Where the link `name` in the directory `folder` points to.

    Raises: OSError; ENXIO, and not readlink(2)'s EINVAL, if it is no link any more: user code may change it meanwhile.
    """
    try:
        return os.readlink(name, dir_fd=folder)
    except OSError as exc:
        if exc.errno == errno.EINVAL:
            raise OSError(errno.ENXIO, f"{name[:200]} is no link any more") from exc
        raise


def close_all_but(keep: Collection[int]) -> None:
    """Close every descriptor that is not in `keep`."""
    first = 0
    try:
        for fd in sorted(keep):
            if fd > first:
                sc.close_range(first, fd - 1)
            first = fd + 1
        sc.close_range(first, _LAST)
    except OSError:
        _close_listed(frozenset(keep))  # a kernel before 5.9


def _close_listed(keep: "frozenset[int]") -> None:
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd not in keep:
            try:
                os.close(fd)
            except OSError:
                pass  # the descriptor of the listing itself
