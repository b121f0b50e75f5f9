"""The memory of a VM that maps a file privately: what it has changed lies in its VMM's own pages, and is found there.

The kernel tells pages apart in /proc/<pid>/pagemap (admin-guide/mm/pagemap.rst): one that was written to is anonymous,
one that was not is still the file's.  So the state of a running VM is its file with these pages laid over it, and
saving it takes as long as it has changed pages.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from podflare.errors import MachineFailed

_PAGE = 4096
_ENTRY = 8
_PRESENT, _SWAPPED, _OF_FILE = 0x80, 0x40, 0x20
"""In the highest byte of an entry: bits 63, 62, 61."""
_OWN = bytes(value for value in range(256) if value & (_PRESENT | _SWAPPED) and not value & _OF_FILE)
_OWN_RUNS = re.compile(b"[" + re.escape(_OWN) + b"]+")
_MAX_GAP = 16
"""Own pages so near to each other are read at once, with what lies between: a system call costs more."""
_CHUNK = 4 << 20
_COPY = 1 << 30
_FICLONE = 0x40049409


@dataclass(frozen=True)
class Run:
    """Adjacent pages, in bytes."""

    offset: int
    size: int


def own_runs(pagemap: bytes) -> list[Run]:
    """Which pages are anonymous, by the entries of a mapping; near ones joined."""
    runs: list[Run] = []
    for found in _OWN_RUNS.finditer(pagemap[_ENTRY - 1 :: _ENTRY]):
        first, end = found.start() * _PAGE, found.end() * _PAGE
        if runs and first - (runs[-1].offset + runs[-1].size) <= _MAX_GAP * _PAGE:
            first = runs.pop().offset
        runs.append(Run(first, end - first))
    return runs


def write_changes(pid: int, base: int, target: int) -> int:
    """Write what the process `pid` has changed in its private mapping of the file `base` to `target`.

    Precondition: the process does not change it meanwhile.
    Returns: how many bytes.
    Raises: MachineFailed if it is gone, or has no such mapping.
    """
    written = 0
    buffer = memoryview(bytearray(_CHUNK))
    try:
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for start, size, offset in _mappings(pid, os.fstat(base)):
                for run in own_runs(_pagemap(pid, start, size)):
                    _write_run(memory, start, target, offset, run, buffer)
                    written += run.size
        finally:
            os.close(memory)
    except OSError as exc:
        raise MachineFailed(f"the memory of a virtual machine could not be read: {exc}") from exc
    return written


def _write_run(memory: int, start: int, target: int, offset: int, run: Run, buffer: memoryview) -> None:
    done = 0
    while done < run.size:
        got = os.preadv(memory, [buffer[: run.size - done]], start + run.offset + done)
        if not got:
            raise OSError(errno.EIO, "a part of the memory is gone")
        os.pwrite(target, buffer[:got], offset + run.offset + done)
        done += got


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
