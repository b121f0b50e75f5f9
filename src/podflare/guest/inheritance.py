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
from typing import Dict, List, Optional, Tuple

from podflare.guest import syscalls as sc

_COPY_BYTES = 1 << 20
_F_DUPFD_QUERY = 1027
_DELETED = " (deleted)"
_KEPT_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK | os.O_SYNC
_PROTECTION = {"r": 1, "w": 2, "x": 4}


@dataclass(frozen=True)
class OpenFile:
    """One descriptor as it was before the fork."""

    fd: int
    target: str
    """What /proc/self/fd says."""
    inode: Tuple[int, int]
    """Device and number."""
    links: int
    mode: int
    flags: int
    position: int
    path: Optional[str]
    """Where this very file has a name: `target`, or after its removal another one beside it; None if it has none."""
    close_on_exec: bool


@dataclass(frozen=True)
class SharedMapping:
    """One shared mapping of /proc/self/maps (proc_pid_maps(5))."""

    start: int
    length: int
    protection: int
    offset: int
    path: str
    inode: int
    at_path: bool


class Inherited:
    """Everything that `survey` found."""

    def __init__(self, files: List[OpenFile], mappings: List[SharedMapping], duplicates: Dict[int, int]) -> None:
        self._files = sorted(files, key=lambda file: file.fd)
        self._mappings = mappings
        self._duplicates = duplicates
        self._copies: Dict[Tuple[int, int], int] = {}
        """Of files without a name, by inode: one copy for all descriptors and mappings of it."""

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
        mine: Dict[int, OpenFile] = {}
        for file in self._files:
            first = mine.get(self._duplicates.get(file.fd, -1))
            if first is not None and first.inode == file.inode:
                os.dup2(first.fd, file.fd, inheritable=not file.close_on_exec)
                continue
            try:
                fresh = self._replacement(file)
            except OSError as exc:
                notes.append(f"{file.target[:200]}: {exc.strerror}; its descriptor {file.fd} is closed now")
                os.close(file.fd)
                continue
            if fresh is not None:
                os.dup2(fresh, file.fd, inheritable=not file.close_on_exec)
                os.close(fresh)
            mine[file.fd] = file
            # Only of one that may be written is the number of links sure: an overlay shows others those of a layer.
            if _is_copied(file) and file.links and file.flags & os.O_ACCMODE != os.O_RDONLY:
                notes.append(f"{file.target[:200]}: what descriptor {file.fd} writes does not reach its other names")
        for mapping in self._mappings:
            try:
                self._own_mapping(mapping)
            except OSError as exc:
                notes.append(f"shared memory {mapping.path[:200] or 'without name'}: {exc.strerror}; still shared")
        self._finish_copies()
        return notes

    def _replacement(self, file: OpenFile) -> Optional[int]:
        """A descriptor of the child's own to put in the place of an inherited one; None to leave it."""
        if not _is_file(file):
            return _stand_in(file)
        path = file.path
        if file.flags & os.O_PATH:
            return os.open(file.target if path is None else path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        if path is None:
            if file.inode not in self._copies:
                self._copies[file.inode] = _copy(file)
            # Opened by each through /proc: the copy has no name either.
            path = f"/proc/self/fd/{self._copies[file.inode]}"
        fresh = os.open(path, (file.flags & _KEPT_FLAGS) | os.O_CLOEXEC | os.O_NOCTTY)
        os.lseek(fresh, file.position, os.SEEK_SET)
        return fresh

    def _own_mapping(self, mapping: SharedMapping) -> None:
        copied = [file for file in self._files if (file.target, file.inode[1]) == (mapping.path, mapping.inode)]
        writable = os.O_RDWR if mapping.protection & 2 else os.O_RDONLY
        if mapping.at_path:
            fd = os.open(mapping.path, writable | os.O_CLOEXEC)
        elif copied and copied[0].inode in self._copies:
            fd = os.dup(self._copies[copied[0].inode])
        else:
            if mapping.protection & 1:
                sc.copy_shared_mapping(mapping.start, mapping.length, mapping.protection)
            return
        try:
            sc.map_file_over(mapping.start, mapping.length, mapping.protection, fd, mapping.offset)
        finally:
            os.close(fd)

    def _finish_copies(self) -> None:
        modes = {file.inode: file.mode for file in self._files}
        for inode, fd in self._copies.items():
            os.fchmod(fd, stat.S_IMODE(modes[inode]))  # now that all have opened it
            os.close(fd)


def find_duplicates() -> Dict[int, int]:
    """Descriptors that share their position with a lower one (dup(2)), by that one.  Called in the parent."""
    seen: Dict[Tuple[int, int], List[int]] = {}
    found: Dict[int, int] = {}
    for fd in sorted(int(name) for name in os.listdir("/proc/self/fd")):
        try:
            status = os.fstat(fd)
            if fd <= 2 or not stat.S_ISREG(status.st_mode):
                continue
            known = seen.setdefault((status.st_dev, status.st_ino), [])
            first = next((other for other in known if _share_position(other, fd)), None)
        except OSError:
            continue  # the descriptor of the listing, or closed by a thread
        if first is None:
            known.append(fd)
        else:
            found[fd] = first
    return found


def _share_position(one: int, other: int) -> bool:
    try:
        return fcntl.fcntl(one, _F_DUPFD_QUERY, other) == 1
    except OSError:
        pass  # before Linux 6.10
    flags = fcntl.fcntl(one, fcntl.F_GETFL)
    fcntl.fcntl(one, fcntl.F_SETFL, flags ^ os.O_NONBLOCK)  # shared as the position is, and of no meaning for a file
    try:
        return bool((fcntl.fcntl(other, fcntl.F_GETFL) ^ flags) & os.O_NONBLOCK)
    finally:
        fcntl.fcntl(one, fcntl.F_SETFL, flags)


def survey(leave: "set[int]", duplicates: Dict[int, int]) -> Inherited:
    """Look at this process before it leaves its parent's mount namespace.

    Args:
        leave: descriptors that are not to be touched.
        duplicates: of `find_duplicates`.
    """
    files = []
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd not in leave:
            file = _look(fd)
            if file is not None:
                files.append(file)
    return Inherited(files, _shared_mappings(), duplicates)


def _look(fd: int) -> Optional[OpenFile]:
    try:
        status = os.fstat(fd)
        target = os.readlink(f"/proc/self/fd/{fd}")
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        close_on_exec = bool(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC)
    except OSError:
        return None  # the descriptor of the listing itself
    # Namespaces, too, are regular files to fstat(2), but without a position.
    position, path = 0, None
    if stat.S_ISREG(status.st_mode) and target.startswith("/"):
        if not flags & os.O_PATH:
            position = os.lseek(fd, 0, os.SEEK_CUR)
        path = _name_of(target, status)
    inode = (status.st_dev, status.st_ino)
    return OpenFile(fd, target, inode, status.st_nlink, status.st_mode, flags, position, path, close_on_exec)


def _name_of(target: str, status: os.stat_result) -> Optional[str]:
    """A name of the file: where it was opened, or among what lies beside that one if it was removed."""
    if _is_at(target, status):
        return target
    if not status.st_nlink or not target.endswith(_DELETED):
        return None
    folder = os.path.dirname(target)
    try:
        with os.scandir(folder) as entries:
            names = [entry.path for entry in entries if entry.inode() == status.st_ino]
    except OSError:
        return None
    return next((name for name in names if _is_at(name, status)), None)


def _is_at(path: str, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), status)
    except OSError:
        return False


def _is_terminal(file: OpenFile) -> bool:
    return stat.S_ISCHR(file.mode) and file.target.startswith(("/dev/pts/", "/dev/ptmx", "/dev/tty"))


def _is_file(file: OpenFile) -> bool:
    return stat.S_ISREG(file.mode) and file.target.startswith("/")


def _is_copied(file: OpenFile) -> bool:
    return _is_file(file) and file.path is None


def _stand_in(file: OpenFile) -> Optional[int]:
    """What takes the place of a descriptor that is no file; None to leave it."""
    if stat.S_ISDIR(file.mode):
        return os.open(file.target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if stat.S_ISLNK(file.mode):
        return os.open(file.target, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
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


def _copy(file: OpenFile) -> int:
    """An unlinked file with the content of one that has no name any more."""
    if file.target.startswith("/memfd:"):
        fresh = os.memfd_create(file.target[7:].partition(_DELETED)[0][:200])
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
            found.append(SharedMapping(start, end - start, bits, int(fields[2], 16), path, inode, at_path))
    return found


def _same_inode(path: str, device: str, inode: int) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return False
    # On an overlay maps(5) shows the device of a layer, so only the inode can be compared.
    return status.st_ino == inode


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
