"""Closing what a forked process has inherited and must not keep."""

from __future__ import annotations

import os
from typing import Collection

from podflare.guest import syscalls as sc

_LAST = 0xFFFFFFFF


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
