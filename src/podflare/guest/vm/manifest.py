"""What the files below some directories are, so that two machines can be compared: made by a child, without a pause.

A file of the image that was not changed is told by that alone (`same`), for both machines have the same image; of
any other one a digest is made.  Links are told, never followed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from typing import Any, Dict, Iterator, List, Optional, Tuple

MAX_ENTRIES = 200_000
MAX_BYTES = 24 * 1024 * 1024
"""Of an answer."""
MAX_TEXT_BYTES = 256 * 1024
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
"""Path, kind, mode, size, digest: of a file its content's, of a link its target; `same`: as in the image."""


class TooMuch(Exception):
    """There is more than an answer holds."""


class Job:
    """One order on its way: a child works, and leaves its answer in a file."""

    def __init__(self, number: int, order: Dict[str, Any]) -> None:
        self.number = number
        self._answer = os.memfd_create("files", os.MFD_CLOEXEC)
        self.fd, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        """Readable when the child has ended."""
        if os.fork() == 0:
            try:
                os.nice(5)  # cells go first
                with os.fdopen(self._answer, "wb") as file:
                    file.write(json.dumps(_work(order)).encode())
            finally:
                os._exit(0)
        os.close(writing)

    def result(self) -> Optional[Dict[str, Any]]:
        """The answer; None as long as it works."""
        try:
            os.read(self.fd, 1)
        except BlockingIOError:
            return None
        os.close(self.fd)
        with os.fdopen(self._answer, "rb") as file:
            file.seek(0)
            data = file.read(MAX_BYTES + 1)
        if not data:
            return {"failed": "the process that looked at the files died"}
        if len(data) > MAX_BYTES:
            return {"too_much": f"an answer of more than {MAX_BYTES} bytes"}
        return dict(json.loads(data))


def _work(order: Dict[str, Any]) -> Dict[str, Any]:
    try:
        if "texts" in order:
            return {"texts": {path: text for path in order["texts"] if (text := _text(path)) is not None}}
        return {"manifest": list(rows(order["paths"]))}
    except TooMuch as exc:
        return {"too_much": str(exc)}
    except OSError as exc:
        return {"failed": f"{type(exc).__name__}: {exc}"}


def rows(paths: List[str], image_device: Optional[int] = None) -> Iterator[Row]:
    """All below `paths`, and they themselves.

    Args: image_device: what stat(2) shows of files that are as in the image; found out if not given.
    """
    device = _image_device() if image_device is None else image_device
    count = 0
    for path in paths:
        for row in _walk(path.rstrip("/") or "/", device, 0):
            count += 1
            if count > MAX_ENTRIES:
                raise TooMuch(f"more than {MAX_ENTRIES} paths; compare fewer directories (paths)")
            yield row


def _image_device() -> int:
    """Of a file that nobody has changed: an overlay shows another device for each of its layers."""
    return os.stat("/usr/lib/os-release").st_dev


def _walk(path: str, device: int, depth: int) -> Iterator[Row]:
    try:
        status = os.lstat(path)
    except OSError:
        return
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), "device")
    yield path, kind, stat.S_IMODE(status.st_mode), _size(kind, status), _digest(path, kind, status, device)
    if kind != "directory" or path in _SKIPPED:
        return
    if depth > MAX_DEPTH:
        raise TooMuch(f"directories nested deeper than {MAX_DEPTH}: {path[:200]}")
    try:
        names = os.listdir(path)
    except OSError:
        return
    for name in names:
        yield from _walk(f"{path.rstrip('/')}/{name}", device, depth + 1)


def _size(kind: str, status: os.stat_result) -> int:
    return status.st_size if kind in ("file", "link") else -1


def _digest(path: str, kind: str, status: os.stat_result, device: int) -> str:
    if kind == "file" and status.st_dev == device:
        return "same"
    try:
        if kind == "link":
            return os.readlink(path)
        if kind == "device":
            return str(status.st_rdev)
        return _content_digest(path) if kind == "file" else ""
    except OSError:
        return "?"  # changed or gone while it is read: counts as changed


def _content_digest(path: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    fd = os.open(path, _FILE)
    try:
        while True:
            data = os.read(fd, _CHUNK)
            if not data:
                return digest.hexdigest()
            digest.update(data)
    finally:
        os.close(fd)


def _text(path: str) -> Optional[str]:
    try:
        fd = os.open(path, _FILE)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode) or os.fstat(fd).st_size > MAX_TEXT_BYTES:
            return None
        return os.read(fd, MAX_TEXT_BYTES).decode()
    except (OSError, UnicodeDecodeError):
        return None
    finally:
        os.close(fd)
