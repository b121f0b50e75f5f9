"""What the files below some directories are, so that two machines can be compared: made by a child, without a pause.

A file has a mark, for which it is not read: inode and times are the same in two machines only if it is as in the image,
or nobody has written to it since they were one.  (Not the device: an overlay shows the image's also of files that were
changed.)  Of those whose marks differ digests are asked for.  Links are told, never followed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import stat
from typing import Any, Dict, Iterator, List, Optional, Tuple

from podflare.guest.vm import contents, control
from podflare.guest.vm.system import files_are_mapped

MAX_ENTRIES = 200_000
MAX_BYTES = 24 * 1024 * 1024
"""Of an answer."""
MAX_TEXT_BYTES = 1 << 20
"""Of one file whose text is wanted."""
MAX_DEPTH = 256
_SKIPPED = ("/proc", "/sys", "/dev", "/run")
_CHUNK = 1 << 20
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

Row = Tuple[str, str, int, int, str]
"""Path, kind, mode, size, mark: of a link its target."""


class TooMuch(Exception):
    """There is more than an answer holds."""


class Job:
    """One order on its way: a child works, and leaves its answer in a file."""

    def __init__(self, number: int, order: Dict[str, Any]) -> None:
        self.number = number
        self._answer = os.memfd_create("files", os.MFD_CLOEXEC)
        self.fd, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        """Readable when the child has ended."""
        self._child = os.fork()
        if self._child == 0:
            try:
                os.nice(5)  # cells go first
                with os.fdopen(self._answer, "wb") as file:
                    if "contents" in order:
                        file.write(contents.line(number, order["contents"]))
                    else:
                        file.write(control.encode(number, _work(order)))
            finally:
                os._exit(0)
        os.close(writing)

    def give_up(self) -> None:
        """Nobody waits for the answer.  Precondition: `result` has given none, and the child is not reaped."""
        os.kill(self._child, signal.SIGKILL)
        os.close(self.fd)
        os.close(self._answer)

    def result(self) -> Optional[bytes]:
        """The line of the answer, as the child has made it; None as long as it works."""
        try:
            os.read(self.fd, 1)
        except BlockingIOError:
            return None
        os.close(self.fd)
        with os.fdopen(self._answer, "rb") as file:
            file.seek(0)
            data = file.read(MAX_BYTES + 1)
        if not data:
            return control.encode(self.number, {"failed": "the process that looked at the files died"})
        if len(data) > MAX_BYTES:
            return control.encode(self.number, {"too_much": f"an answer of more than {MAX_BYTES} bytes"})
        return data


def _work(order: Dict[str, Any]) -> Dict[str, Any]:
    try:
        if "texts" in order:
            return {"texts": {path: text for path in order["texts"] if (text := _text(path)) is not None}}
        if "digests" in order:
            return {"digests": {path: digest for path in order["digests"] if (digest := _digest(path)) is not None}}
        return {"manifest": list(rows(order["paths"]))}
    except TooMuch as exc:
        return {"too_much": str(exc)}
    except OSError as exc:
        return {"failed": f"{type(exc).__name__}: {exc}"}


def rows(paths: List[str]) -> Iterator[Row]:
    """All below `paths`, and they themselves."""
    # Marks that are nobody else's: then every file is read.
    salt = os.urandom(8).hex() if files_are_mapped() else ""
    count = size = 0
    for path in paths:
        if _leads_through_a_link(path):
            continue
        for row in _walk(path.rstrip("/") or "/", salt, 0):
            count += 1
            size += len(row[0]) + len(row[4])
            if count > MAX_ENTRIES or size > MAX_BYTES:
                raise TooMuch(f"more than {MAX_ENTRIES} paths, or more text of them; compare fewer directories (paths)")
            yield row


def _leads_through_a_link(path: str) -> bool:
    parts = path.split("/")
    return any(os.path.islink("/".join(parts[:end])) for end in range(2, len(parts)))


def _walk(path: str, salt: str, depth: int) -> Iterator[Row]:
    try:
        status = os.lstat(path)
    except OSError:
        return
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), "device")
    yield path, kind, stat.S_IMODE(status.st_mode), _size(kind, status), _mark(path, kind, status, salt)
    if kind != "directory" or path in _SKIPPED:
        return
    if depth > MAX_DEPTH:
        raise OSError(errno.ENAMETOOLONG, f"directories nested deeper than {MAX_DEPTH}: {path[:200]}")
    try:
        names = os.listdir(path)
    except OSError:
        return
    for name in names:
        yield from _walk(f"{path.rstrip('/')}/{name}", salt, depth + 1)


def _size(kind: str, status: os.stat_result) -> int:
    return status.st_size if kind in ("file", "link") else -1


def mark_of_file(status: os.stat_result) -> str:
    """Another one whenever the file is written to."""
    return f"{status.st_ino}.{status.st_ctime_ns}.{status.st_mtime_ns}"


def _mark(path: str, kind: str, status: os.stat_result, salt: str) -> str:
    if kind == "file":
        return mark_of_file(status) + salt
    try:
        return os.readlink(path) if kind == "link" else str(status.st_rdev) if kind == "device" else ""
    except OSError:
        return "?"  # gone meanwhile: counts as changed


def _digest(path: str) -> Optional[str]:
    """Of a file's content; None if it is gone, or no file any more."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        fd = os.open(path, _FILE)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return None
            while True:
                data = os.read(fd, _CHUNK)
                if not data:
                    return digest.hexdigest()
                digest.update(data)
        finally:
            os.close(fd)
    except OSError:
        return None


def _text(path: str) -> Optional[str]:
    try:
        fd = os.open(path, _FILE)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode) or os.fstat(fd).st_size > MAX_TEXT_BYTES:
            return None
        data = os.read(fd, MAX_TEXT_BYTES)
        return None if b"\0" in data else data.decode()
    except (OSError, UnicodeDecodeError):
        return None
    finally:
        os.close(fd)
