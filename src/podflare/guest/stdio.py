"""File descriptors 0, 1, 2 and sys.stdin, sys.stdout, sys.stderr of a REPL, which user code may break at will.

What user code puts in the place of sys.stdout stays, as in any Python; what it closes or deletes is made new.
"""

from __future__ import annotations

import fcntl
import io
import os
import resource
import sys
from typing import Any, Dict, List, TextIO, Tuple

_PREFERRED_BASE = 512
_NAMES = ("stdin", "stdout", "stderr")


def high_copy(fd: int) -> int:
    """A close-on-exec copy of `fd` out of the way of user code that closes low descriptors wholesale."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    base = _PREFERRED_BASE if soft == resource.RLIM_INFINITY or soft >= 2 * _PREFERRED_BASE else soft // 2
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, base)


class StandardStreams:
    """The real streams, and how to get back to them."""

    def __init__(self) -> None:
        """Precondition: 0, 1 and 2 are what they shall stay."""
        self._copies = [high_copy(fd) for fd in range(3)]
        self._identity = [_identity(fd) for fd in range(3)]
        self._own: Dict[str, TextIO] = {}
        for name in _NAMES:
            self._renew(name)
            setattr(sys, name, self._own[name])
            setattr(sys, f"__{name}__", self._own[name])

    @property
    def descriptors(self) -> List[int]:
        """The copies kept out of user code's way."""
        return list(self._copies)

    def move_to(self, stdout: int, stderr: int) -> None:
        """After a fork: the same streams write to other pipes."""
        for fd, source in ((1, stdout), (2, stderr)):
            os.dup2(source, fd)
            os.dup2(source, self._copies[fd], inheritable=False)
            self._identity[fd] = _identity(fd)

    def restore(self) -> None:
        """Make descriptors and sys streams usable again where they are not.

        May run user code (a stream of the user's own).  Raises: KeyboardInterrupt.
        """
        for fd in range(3):
            if _identity(fd) != self._identity[fd]:
                os.dup2(self._copies[fd], fd)
            # Some programs make what they inherit non-blocking, for everybody who shares it; print() then fails.
            if not os.get_blocking(fd):
                os.set_blocking(fd, True)
        for name in _NAMES:
            if not _usable(self._own[name]):
                self._renew(name)
            own = self._own[name]
            if getattr(sys, f"__{name}__", None) is not own:
                setattr(sys, f"__{name}__", own)
            current = getattr(sys, name, None)
            if current is not own and not _usable(current):
                setattr(sys, name, own)

    def flush(self) -> None:
        """Send out what is buffered, in the user's own streams as well."""
        for name in ("stdout", "stderr"):
            for stream in {id(s): s for s in (getattr(sys, name, None), self._own[name])}.values():
                try:
                    stream.flush()  # type: ignore[union-attr]  # anything may stand there; that is what `except` is for
                except KeyboardInterrupt:
                    raise
                except BaseException:  # noqa: BLE001, S110  # a stream that cannot be flushed has nothing for us
                    pass

    def write_error(self, text: str) -> None:
        """Write to the real standard error, whatever sys.stderr is."""
        stream = self._own["stderr"]
        stream.write(text)
        stream.flush()

    def _renew(self, name: str) -> None:
        fd = _NAMES.index(name)
        if name == "stdin":
            reader = io.BufferedReader(io.FileIO(fd, "r", closefd=False))
            stream: TextIO = io.TextIOWrapper(reader, encoding="utf-8", errors="surrogateescape")
        else:
            # Lone surrogates (file names that are no UTF-8) must not make print() fail.
            writer = io.BufferedWriter(io.FileIO(fd, "w", closefd=False))
            stream = io.TextIOWrapper(writer, encoding="utf-8", errors="backslashreplace", line_buffering=True)
        self._own[name] = stream


def _identity(fd: int) -> Tuple[int, int]:
    try:
        status = os.fstat(fd)
    except OSError:
        return (-1, -1)
    return (status.st_dev, status.st_ino)


def _usable(stream: Any) -> bool:
    try:
        return stream is not None and not getattr(stream, "closed", False)
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001  # a stream that cannot even say so is not usable
        return False
