"""What a forked process still shares with its parent, and how it gets its own.

An inherited descriptor shares its offset and its inode with the parent, a shared mapping its pages: each regular
file is opened anew in the child's own root at the same offset, deleted ones are copied, sockets and pipes are
replaced by dead ones (never shut down: that would reach the parent), shared memory is copied.
"""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import socket
import stat
from dataclasses import dataclass
from typing import Dict, List, Optional

from podflare.guest import syscalls as sc

_COPY_BYTES = 1 << 20
_KEPT_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK | os.O_SYNC
_PROTECTION = {"r": 1, "w": 2, "x": 4}


@dataclass(frozen=True)
class OpenFile:
    """One descriptor as it was before the fork."""

    fd: int
    target: str
    """What /proc/self/fd says."""
    mode: int
    flags: int
    position: int
    at_path: bool
    """Whether `target` names this very file: not deleted, not replaced by another one."""
    close_on_exec: bool


@dataclass(frozen=True)
class SharedMapping:
    """One shared mapping of /proc/self/maps (proc_pid_maps(5))."""

    start: int
    length: int
    protection: int
    offset: int
    path: str
    at_path: bool


class Inherited:
    """Everything that `survey` found."""

    def __init__(self, files: List[OpenFile], mappings: List[SharedMapping]) -> None:
        self._files = files
        self._mappings = mappings

    def losses(self) -> Dict[str, int]:
        """What cannot cross, counted."""
        counts = {"sockets": 0, "pipes": 0, "terminals": 0}
        for file in self._files:
            if stat.S_ISSOCK(file.mode):
                counts["sockets"] += 1
            elif stat.S_ISFIFO(file.mode):
                counts["pipes"] += 1
            elif _is_terminal(file):
                counts["terminals"] += 1
        return counts

    def make_independent(self) -> List[str]:
        """Cut every tie to the parent.  Returns notes on files that could not be had."""
        notes: List[str] = []
        for file in self._files:
            try:
                fresh = _replacement(file)
            except OSError as exc:
                notes.append(f"{file.target[:200]}: {exc.strerror}; its descriptor {file.fd} is closed now")
                os.close(file.fd)
                continue
            if fresh is not None:
                os.dup2(fresh, file.fd, inheritable=not file.close_on_exec)
                os.close(fresh)
        for mapping in self._mappings:
            try:
                _own_mapping(mapping)
            except OSError as exc:
                notes.append(f"shared memory {mapping.path[:200] or 'without name'}: {exc.strerror}; still shared")
        return notes


def survey(leave: "set[int]") -> Inherited:
    """Look at this process before it leaves its parent's mount namespace.

    Args:
        leave: descriptors that are not to be touched.
    """
    files = []
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd not in leave:
            file = _look(fd)
            if file is not None:
                files.append(file)
    return Inherited(files, _shared_mappings())


def _look(fd: int) -> Optional[OpenFile]:
    try:
        status = os.fstat(fd)
        target = os.readlink(f"/proc/self/fd/{fd}")
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        close_on_exec = bool(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC)
    except OSError:
        return None  # the descriptor of the listing itself
    # Namespaces, too, are regular files to fstat(2), but without a position.
    position = os.lseek(fd, 0, os.SEEK_CUR) if stat.S_ISREG(status.st_mode) and target.startswith("/") else 0
    return OpenFile(fd, target, status.st_mode, flags, position, _is_at(target, status), close_on_exec)


def _is_at(path: str, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), status)
    except OSError:
        return False


def _is_terminal(file: OpenFile) -> bool:
    return stat.S_ISCHR(file.mode) and file.target.startswith(("/dev/pts/", "/dev/ptmx", "/dev/tty"))


def _replacement(file: OpenFile) -> Optional[int]:
    """A descriptor of the child's own to put in the place of an inherited one; None to leave it."""
    if stat.S_ISREG(file.mode) and file.target.startswith("/"):
        fresh = _reopen(file) if file.at_path else _copy(file)
        os.lseek(fresh, file.position, os.SEEK_SET)
        return fresh
    if stat.S_ISDIR(file.mode):
        return os.open(file.target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if stat.S_ISSOCK(file.mode):
        return _dead_socket()
    if stat.S_ISFIFO(file.mode):
        return _dead_pipe(file.flags & os.O_ACCMODE)
    if "eventpoll" in file.target:
        # An epoll instance is shared like a file: what the child removed would be gone for the parent.
        with select.epoll() as fresh_epoll:
            return os.dup(fresh_epoll.fileno())
    if not file.target.startswith("/") or _is_terminal(file):
        return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    return None  # /dev/null and its like: no state to share


def _reopen(file: OpenFile) -> int:
    return os.open(file.target, (file.flags & _KEPT_FLAGS) | os.O_CLOEXEC | os.O_NOCTTY)


def _copy(file: OpenFile) -> int:
    """An unlinked file with the content of one that has no name any more."""
    if file.target.startswith("/memfd:"):
        fresh = os.memfd_create(file.target[7:].partition(" (deleted)")[0][:200])
    else:
        path = f"/tmp/.podflare-{os.urandom(8).hex()}"
        fresh = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.unlink(path)
    try:
        # Readable even if the original was opened for writing only: through its own entry in /proc.
        source = os.dup(file.fd) if file.flags & os.O_ACCMODE != os.O_WRONLY else _readable(file.fd)
        try:
            offset = 0
            while True:
                # pread: the offset is still the parent's.
                data = os.pread(source, _COPY_BYTES, offset)
                if not data:
                    break
                os.pwrite(fresh, data, offset)
                offset += len(data)
        finally:
            os.close(source)
        if file.flags & os.O_APPEND:
            fcntl.fcntl(fresh, fcntl.F_SETFL, file.flags & _KEPT_FLAGS)
    except BaseException:
        os.close(fresh)
        raise
    return fresh


def _readable(fd: int) -> int:
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def _dead_socket() -> int:
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours.detach()


def _dead_pipe(access: int) -> int:
    reader, writer = os.pipe()
    keep, close = (writer, reader) if access == os.O_WRONLY else (reader, writer)
    os.close(close)
    return keep


def _shared_mappings() -> List[SharedMapping]:
    found = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            fields = line.split(None, 5)
            protection, path = fields[1], fields[5].rstrip("\n") if len(fields) > 5 else ""
            if protection[3] != "s":
                continue
            start, end = (int(part, 16) for part in fields[0].split("-"))
            device, inode = fields[3], int(fields[4])
            bits = sum(_PROTECTION[letter] for letter in protection[:3] if letter in _PROTECTION)
            at_path = path.startswith("/") and _same_inode(path, device, inode)
            found.append(SharedMapping(start, end - start, bits, int(fields[2], 16), path, at_path))
    return found


def _same_inode(path: str, device: str, inode: int) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return False
    # On an overlay maps(5) shows the device of a layer, so only the inode can be compared.
    return status.st_ino == inode


def _own_mapping(mapping: SharedMapping) -> None:
    if mapping.at_path:
        writable = os.O_RDWR if mapping.protection & 2 else os.O_RDONLY
        fd = os.open(mapping.path, writable | os.O_CLOEXEC)
        try:
            sc.map_file_over(mapping.start, mapping.length, mapping.protection, fd, mapping.offset)
        finally:
            os.close(fd)
    elif mapping.protection & 1:
        sc.copy_shared_mapping(mapping.start, mapping.length, mapping.protection)


def copy_shared_memory(parents_shm: int) -> List[str]:
    """Fill this machine's /dev/shm with what was in the parent's, of which the descriptor is open."""
    notes: List[str] = []
    for name in os.listdir(parents_shm):
        source, target = f"/proc/self/fd/{parents_shm}/{name}", f"/dev/shm/{name}"
        try:
            if stat.S_ISDIR(os.stat(name, dir_fd=parents_shm, follow_symlinks=False).st_mode):
                shutil.copytree(source, target, symlinks=True)
            else:
                shutil.copy2(source, target, follow_symlinks=False)
        except (OSError, shutil.Error):
            notes.append(f"/dev/shm: {name[-200:]} could not be copied")
    return notes
