"""The memory of a VM that maps a file privately: what it has changed lies in its VMM's own pages, and is found there.

The kernel tells pages apart in /proc/<pid>/pagemap (admin-guide/mm/pagemap.rst): one that was written to is anonymous,
one that was not is still the file's.  So the state of a running VM is its file with these pages laid over it, and
saving it takes as long as it has changed pages.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from podflare.errors import MachineFailed

_PAGE = 4096
_ENTRY = 8
_PRESENT, _SWAPPED, _OF_FILE = 0x80, 0x40, 0x20
"""In the highest byte of an entry: bits 63, 62, 61."""
_IS_OWN = bytes(bool(value & (_PRESENT | _SWAPPED) and not value & _OF_FILE) for value in range(256))
"""1 for what the highest byte of an anonymous page's entry can be."""
_MAX_GAP = 2
"""Own pages so near to each other are read at once, with what lies between: a system call costs more."""
KEPT_BYTES = 64 << 20
"""Of changes that are written only when the machine goes on; it stands still for the rest."""
_CHUNK = 4 << 20
_COPY = 1 << 30
_FICLONE = 0x40049409


@dataclass(frozen=True)
class Run:
    """Adjacent pages, in bytes."""

    offset: int
    size: int


Change = tuple[int, bytes]
"""Where in the file, and what is there now."""


def own_runs(pagemap: bytes) -> list[Run]:
    """Which pages are anonymous, by the entries of a mapping; near ones joined."""
    own = pagemap[_ENTRY - 1 :: _ENTRY].translate(_IS_OWN)
    runs: list[Run] = []
    # Searched byte by byte: several times as fast as by a regular expression, and the machine stands still meanwhile.
    at = first = own.find(1)
    while at >= 0:
        end = own.find(0, at)
        end = len(own) if end < 0 else end
        at = own.find(1, end)
        if at < 0 or at - end > _MAX_GAP:
            runs.append(Run(first * _PAGE, (end - first) * _PAGE))
            first = at
    return runs


def take_changes(pid: int, base: int, target: int) -> list[Change]:
    """Read what the process `pid` has changed in its private mapping of the file `base`, to be written to `target`.

    Precondition: the process does not change it meanwhile.
    Returns: what is still to be written (`write_changes`), up to KEPT_BYTES: that need not hold the process up.
    Raises: MachineFailed if it is gone, or has no such mapping.
    """
    kept: list[Change] = []
    room = KEPT_BYTES
    try:
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for start, size, offset in _mappings(pid, os.fstat(base)):
                for run in own_runs(_pagemap(pid, start, size)):
                    for at in range(run.offset, run.offset + run.size, _CHUNK):
                        change = offset + at, _read(memory, start + at, min(_CHUNK, run.offset + run.size - at))
                        room -= len(change[1])
                        if room >= 0:
                            kept.append(change)
                        else:
                            write_changes([change], target)
        finally:
            os.close(memory)
    except OSError as exc:
        raise MachineFailed(f"the memory of a virtual machine could not be read: {exc}") from exc
    return kept


def _read(memory: int, at: int, size: int) -> bytes:
    data = os.pread(memory, size, at)
    if len(data) < size:
        raise OSError(errno.EIO, "a part of the memory is gone")
    return data


def write_changes(changes: Iterable[Change], target: int) -> None:
    """Raises: OSError."""
    for offset, data in changes:
        done = 0
        while done < len(data):
            done += os.pwrite(target, data[done:] if done else data, offset + done)


def _mappings(pid: int, file: os.stat_result) -> list[tuple[int, int, int]]:
    """(address, size, offset in the file) of every mapping of the file."""
    wanted = (f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}", str(file.st_ino))
    found = []
    with open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            addresses, _, offset, device, inode, *_ = line.split(None, 5)
            if (device, inode) == wanted:
                start, end = (int(part, 16) for part in addresses.split("-"))
                found.append((start, end - start, int(offset, 16)))
    if not found:
        raise OSError(errno.ENOENT, "it maps no such file")
    return found


def _pagemap(pid: int, start: int, size: int) -> bytes:
    entries = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        want, at = size // _PAGE * _ENTRY, start // _PAGE * _ENTRY
        parts = []
        while want:
            part = os.pread(entries, want, at)
            if not part:
                raise OSError(errno.EIO, "the process is gone")
            parts.append(part)
            want, at = want - len(part), at + len(part)
        return b"".join(parts)
    finally:
        os.close(entries)


def copy_sparse(source: int, target: int) -> None:
    """Make the empty file `target` a copy of `source`: shared blocks where the file system can, else what holds data.

    Raises: OSError.
    """
    try:
        fcntl.ioctl(target, _FICLONE, source)
        return
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.EPERM):
            raise
    os.ftruncate(target, os.fstat(source).st_size)
    lay_over(source, target)


def lay_over(source: int, target: int) -> None:
    """Write what the sparse file `source` holds over `target`, which stays as it is elsewhere.  Raises: OSError."""
    for run in data_runs(source):
        _copy_run(source, target, run)


def data_runs(file: int) -> Iterator[Run]:
    """Where a sparse file holds data."""
    end = 0
    while True:
        try:
            first = os.lseek(file, end, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(file, first, os.SEEK_HOLE)
        yield Run(first, end - first)


def _copy_run(source: int, target: int, run: Run) -> None:
    done = 0
    while done < run.size:
        at = run.offset + done
        try:
            copied = os.copy_file_range(source, target, min(_COPY, run.size - done), at, at)
        except OSError as exc:
            if exc.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            copied = os.pwrite(target, os.pread(source, min(_CHUNK, run.size - done), at), at)
        if not copied:
            return  # the source became shorter, which no file of ours does
        done += copied
