"""Telling the user something besides the result."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable

from podflare.client._calls import parse_texts
from podflare.errors import PodflareWarning, SandboxEndingWarning

_PACKAGE = __name__.partition(".")[0] + "."


def warn(texts: object) -> None:
    """One PodflareWarning for each text of the daemon, shown at the user's own line.

    Raises: PodflareWarning where the user has turned warnings into errors.
    """
    for text in parse_texts(texts):
        warnings.warn(text, PodflareWarning, stacklevel=_user_level())


def warn_of_end(texts: Iterable[str]) -> None:
    """One SandboxEndingWarning for each text.  Raises: as `warn`."""
    for text in texts:
        warnings.warn(text, SandboxEndingWarning, stacklevel=_user_level())


def _user_level() -> int:
    """How many frames above `warn` the first one outside of this package is."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    return level


def note(exc: BaseException, text: str) -> None:
    """Add `text` to an exception under way, where Python can (3.11)."""
    add_note = getattr(exc, "add_note", None)
    if add_note is not None:
        add_note(text)
