"""File transfers between host and sandbox, in steps small enough not to hold up a cell's output.

Runs in the agent, so it needs neither the REPL nor its lock.  The paths and what lies at them are user code's:
nothing here may block on a FIFO, follow a device, or leave half a file under the final name.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from typing import Dict, Optional, Union

from podflare.errors import ProtocolError
from podflare.guest.link import Link
from podflare.wire import frames
from podflare.wire.messages import (
    DENIED,
    MISSING,
    NO_SPACE,
    NOT_A_FILE,
    OTHER,
    WINDOW_BYTES,
    Ack,
    Cancel,
    DataEnd,
    FileDone,
    FileFailed,
    FileOpened,
    FileRead,
    FileWrite,
    GuestMessage,
    to_payload,
)

MAX_TRANSFERS = 64
_REASONS = {
    errno.ENOENT: MISSING,
    errno.EACCES: DENIED,
    errno.EPERM: DENIED,
    errno.EROFS: DENIED,
    errno.EISDIR: NOT_A_FILE,
    errno.ENOTDIR: NOT_A_FILE,
    errno.EEXIST: NOT_A_FILE,
    errno.ENXIO: NOT_A_FILE,
    errno.ENOSPC: NO_SPACE,
    errno.EDQUOT: NO_SPACE,
    errno.EFBIG: NO_SPACE,
}
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

FileMessage = Union[FileRead, FileWrite, Ack, DataEnd, Cancel]


class _Refused(Exception):
    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class _Reading:
    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd
        self.sent = 0
        self.window = WINDOW_BYTES

    def close(self) -> None:
        os.close(self.fd)


class _Writing:
    """Content goes to a temporary file beside the target, which replaces the target at the end."""

    def __init__(self, path: str, target: str) -> None:
        self.path = path
        self._target = target
        self._temporary = os.path.join(os.path.dirname(target), f".podflare-{secrets.token_hex(8)}")
        self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self.size = 0

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]
        self.size += len(data)

    def finish(self) -> None:
        """Give the content the final name, with the mode of the file that it replaces."""
        try:
            os.fchmod(self._fd, stat.S_IMODE(os.stat(self._target).st_mode))
        except FileNotFoundError:
            pass
        os.rename(self._temporary, self._target)
        os.close(self._fd)

    def close(self) -> None:
        """Undo: nothing of the transfer is left."""
        os.close(self._fd)
        try:
            os.unlink(self._temporary)
        except OSError:
            pass  # user code removed it, or its folder


class Transfers:
    """All transfers under way."""

    def __init__(self, link: Link, home: str) -> None:
        self._link = link
        self._home = home
        self._active: Dict[int, Union[_Reading, _Writing]] = {}

    def handle(self, channel: int, message: FileMessage) -> None:
        """A file message of the host.  Those for a transfer that has ended meanwhile are ignored.

        Raises: ProtocolError if a transfer is opened on a channel in use.
        """
        if isinstance(message, (FileRead, FileWrite)):
            if channel in self._active:
                raise ProtocolError(f"channel {channel} is in use")
            self._guard(channel, message.path, lambda: self._open(channel, message))
            return
        transfer = self._active.get(channel)
        if isinstance(message, Cancel):
            self._drop(channel)
        elif isinstance(message, Ack) and isinstance(transfer, _Reading):
            transfer.window += message.bytes
        elif isinstance(message, DataEnd) and isinstance(transfer, _Writing):
            self._guard(channel, transfer.path, lambda: self._finish(channel, transfer))

    def data(self, channel: int, payload: bytes) -> None:
        """Content of a file that the host writes."""
        transfer = self._active.get(channel)
        if isinstance(transfer, _Writing):
            self._guard(channel, transfer.path, lambda: self._store(channel, transfer, payload))

    def drop_all(self) -> None:
        """Forget every transfer; partial writes are removed."""
        for channel in list(self._active):
            self._drop(channel)

    def can_step(self) -> bool:
        """Whether `step` would do something now."""
        return not self._link.full and any(isinstance(t, _Reading) and t.window > 0 for t in self._active.values())

    def step(self) -> None:
        """Send one piece of each file that is being read and may be sent."""
        for channel, transfer in list(self._active.items()):
            if isinstance(transfer, _Reading) and transfer.window > 0 and not self._link.full:
                self._guard(channel, transfer.path, lambda c=channel, t=transfer: self._send_piece(c, t))

    def _open(self, channel: int, message: Union[FileRead, FileWrite]) -> None:
        if len(self._active) >= MAX_TRANSFERS:
            raise _Refused(OTHER, f"more than {MAX_TRANSFERS} file transfers at a time")
        path = self._resolve(message.path)
        if isinstance(message, FileWrite):
            self._active[channel] = _open_for_writing(message.path, path)
        else:
            reading = _open_for_reading(message.path, path)
            self._active[channel] = reading
            self._say(channel, FileOpened(size=os.fstat(reading.fd).st_size))

    def _store(self, channel: int, transfer: _Writing, payload: bytes) -> None:
        transfer.write(payload)
        self._say(channel, Ack(bytes=len(payload)))

    def _finish(self, channel: int, transfer: _Writing) -> None:
        transfer.finish()
        del self._active[channel]
        self._say(channel, FileDone(size=transfer.size))

    def _send_piece(self, channel: int, transfer: _Reading) -> None:
        data = os.read(transfer.fd, min(frames.MAX_DATA_BYTES, transfer.window))
        if data:
            transfer.sent += len(data)
            transfer.window -= len(data)
            self._link.send(frames.DATA, channel, data)
        else:
            self._drop(channel)
            self._say(channel, FileDone(size=transfer.sent))

    def _guard(self, channel: int, path: str, action: object) -> None:
        """Run `action`; its failure ends the transfer and is told."""
        assert callable(action)
        try:
            action()
        except (_Refused, OSError, ValueError) as exc:
            self._drop(channel)
            self._say(channel, _failure(path, exc))
        except RecursionError:
            # The library follows links, and makes directories, by calling itself.
            self._drop(channel)
            self._say(channel, FileFailed(reason=OTHER, message=f"{path}: too many links or directories on the way"))

    def _drop(self, channel: int) -> None:
        transfer = self._active.pop(channel, None)
        if transfer is not None:
            transfer.close()

    def _say(self, channel: int, message: GuestMessage) -> None:
        self._link.send(frames.MESSAGE, channel, to_payload(message))

    def _resolve(self, path: str) -> str:
        if path == "~" or path.startswith("~/"):
            path = self._home + path[1:]
        return os.path.join(self._home, path)


def _open_for_reading(name: str, path: str) -> _Reading:
    # Looked at first: opening a FIFO would let go a writer that waits for a reader.
    _demand_regular(os.stat(path))
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _demand_regular(os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return _Reading(name, fd)


def _open_for_writing(name: str, path: str) -> _Writing:
    if path.endswith("/"):
        raise _Refused(NOT_A_FILE, "the path ends with /")
    target = os.path.realpath(path)  # through a link, so that the link stays one
    existing: Optional[os.stat_result] = None
    try:
        existing = os.stat(target)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(target), exist_ok=True)
    if existing is not None:
        _demand_regular(existing)
    return _Writing(name, target)


def _demand_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((words for test, words in _KINDS if test(status.st_mode)), "no regular file")
        raise _Refused(NOT_A_FILE, f"it is {kind}")


def _failure(path: str, exc: Exception) -> FileFailed:
    if isinstance(exc, _Refused):
        return FileFailed(reason=exc.reason, message=f"{path}: {exc}")
    if isinstance(exc, OSError) and exc.errno is not None:
        return FileFailed(reason=_REASONS.get(exc.errno, OTHER), message=f"{path}: {os.strerror(exc.errno)}")
    return FileFailed(reason=OTHER, message=f"{path}: {exc}")
