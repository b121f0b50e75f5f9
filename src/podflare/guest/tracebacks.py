"""An exception of a cell as text: the frames of user code and its libraries, never ours.

Formats what hostile objects say of themselves, so every step may fail or take long; the result is bounded.
"""

from __future__ import annotations

import linecache
import os
import tokenize  # noqa: F401  # linecache and traceback import it when first needed, then from the user's sys.path
import traceback
from types import TracebackType
from typing import List, Optional, Set, Tuple

from podflare.wire.messages import MAX_TEXT_CHARS, MAX_TRACEBACK_CHARS

_OUR_FOLDER = os.path.dirname(os.path.abspath(__file__)) + os.sep
_MAX_CHAIN = 100
_MAX_FRAMES = 2000
"""Of one exception, at 10 us each; above Python's own recursion limit, so that only who raised that loses frames."""
# Kept, for user code may put something else in its place.
_TracebackException = traceback.TracebackException
_MAX_KEPT_SOURCE_CHARS = 64 * 1024 * 1024


class CellSources:
    """Source of past cells for tracebacks and inspect.getsource; the oldest go when the sum gets too large."""

    def __init__(self) -> None:
        self._sizes: List[Tuple[str, int]] = []
        self._total = 0
        self.names: Set[str] = set()

    def add(self, name: str, source: str) -> None:
        # Without a modification time linecache.checkcache leaves an entry alone.
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        self.names.add(name)
        self._sizes.append((name, len(source)))
        self._total += len(source)
        while self._total > _MAX_KEPT_SOURCE_CHARS and len(self._sizes) > 1:
            oldest, size = self._sizes.pop(0)
            self._total -= size
            if all(oldest != other for other, _ in self._sizes):
                linecache.cache.pop(oldest, None)
                self.names.discard(oldest)


def user_traceback(exc: BaseException, cells: Set[str]) -> Optional[TracebackType]:
    """The traceback from the cell's own line on; without one (awaits that never ran) all frames that are not ours."""
    # Read past whatever attribute access the exception's class defines.
    whole: Optional[TracebackType] = BaseException.__dict__["__traceback__"].__get__(exc)
    tb = whole
    while tb is not None and tb.tb_frame.f_code.co_filename not in cells:
        tb = tb.tb_next
    if tb is not None:
        return tb
    tb = whole
    while tb is not None and _is_ours(tb.tb_frame.f_code.co_filename):
        tb = tb.tb_next
    return tb


def shortened(tb: Optional[TracebackType]) -> Tuple[Optional[TracebackType], int]:
    """`tb`, or its first and last frames if it is very long, and how many were left out.  Changes nothing of `tb`."""
    frames: List[TracebackType] = []
    rest = tb
    while rest is not None:
        frames.append(rest)
        rest = rest.tb_next
    left_out = len(frames) - _MAX_FRAMES
    if left_out <= 0:
        return tb, 0
    half = _MAX_FRAMES // 2
    short: TracebackType = frames[-half]
    for one in reversed(frames[:half]):
        short = TracebackType(short, one.tb_frame, one.tb_lasti, one.tb_lineno)
    return short, left_out


def describe(exc: BaseException, cells: Set[str]) -> Tuple[str, str, str]:
    """(class name, message, traceback text with newline) of an uncaught exception; bounded."""
    name = _name(exc)
    # First: the traceback module swallows an interrupt that hits a slow __str__, this does not.
    message = _clip(_message(exc), MAX_TEXT_CHARS)
    tb, left_out = shortened(user_traceback(exc, cells))
    try:
        report = _TracebackException(type(exc), exc, tb, limit=-_MAX_FRAMES)  # the limit: of what it was raised from
        text = "".join(_format(report, has_frames=tb is not None))
        if left_out:
            text = f"[{left_out} frames in the middle are left out]\n{text}"
    except Exception as failure:  # noqa: BLE001  # hostile attributes, recursion, memory: the cell still gets its error
        text = f"{_frames_alone(tb)}{name}: <could not be formatted: {_name(failure)}>\n"
    return name, message, _clip(text, MAX_TRACEBACK_CHARS)


def _frames_alone(tb: Optional[TracebackType]) -> str:
    try:
        return "Traceback (most recent call last):\n" + "".join(traceback.format_tb(tb))
    except Exception:  # noqa: BLE001  # even the modules may have been tampered with
        return ""


def _format(report: traceback.TracebackException, *, has_frames: bool) -> List[str]:
    _drop_our_frames(report)
    if not has_frames and report.__cause__ is None and report.__context__ is None:
        return list(report.format_exception_only())  # a syntax error of the cell itself has no frames
    return list(report.format())


def _drop_our_frames(report: traceback.TracebackException) -> None:
    waiting, seen = [report], 0
    while waiting and seen < _MAX_CHAIN:
        current = waiting.pop()
        seen += 1
        if current.stack is not None:
            current.stack[:] = [frame for frame in current.stack if not _is_ours(frame.filename)]
        waiting += [other for other in (current.__cause__, current.__context__) if other is not None]


def _message(exc: BaseException) -> str:
    try:
        return str(exc)
    except KeyboardInterrupt:
        raise
    except BaseException as failure:  # noqa: BLE001  # str() of a user's class may raise anything
        return f"<unprintable: str() raised {_name(failure)}>"


def _name(exc: BaseException) -> str:
    """Name of its class, read past whatever a metaclass defines."""
    return str(type.__dict__["__name__"].__get__(type(exc)))[:200]


def _is_ours(filename: str) -> bool:
    return filename.startswith(_OUR_FOLDER)


def _clip(text: str, limit: int) -> str:
    """`text`, or its head and tail with a note of what lies between."""
    if len(text) <= limit:
        return text
    half = (limit - 100) // 2
    return f"{text[:half]}\n... [{len(text) - 2 * half} characters left out] ...\n{text[-half:]}"
