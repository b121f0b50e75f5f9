"""What a client knows of one sandbox, and so what its answers may be.  Pure.

In every sandbox's Python process a variable `state` is folded with the token of each cell, so that it tells which cells
have run in it, in which order, and never those of another sandbox.  An operation whose outcome is not known makes more
than one state possible.  A Python process that was lost has the state "", and its daemon must have said so.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

CELL = """
import hashlib as _h
state = _h.sha256((globals().get("state", "") + "{token}").encode()).hexdigest()[:16]
print("{token}", state, open("/proc/1/stat").read().rpartition(")")[2].split()[19])
"""
"""Prints its token, the state, and when the sandbox's first process began: by that it is known from outside."""
LOST = ""


def fold(state: str, token: str) -> str:
    return hashlib.sha256((state + token).encode()).hexdigest()[:16]


class Wrong(Exception):
    """An answer that no history explains."""


@dataclass
class Known:
    """One sandbox, as its only user knows it."""

    id: str
    since: float
    """When it began to be known, on the clock that all processes of the machine share."""
    states: set[str] = field(default_factory=lambda: {LOST})
    """What the variable may be now."""
    files: dict[str, set[bytes | None]] = field(default_factory=dict)
    """Path -> what the file may hold, None for no file."""
    brought: set[str] = field(default_factory=set)
    """What merges brought since its last cell: so long a process may be lost and nobody has said so yet."""
    born: str = ""
    """The first process's start, as the latest whole answer said."""

    def fork(self, child: str, since: float) -> Known:
        """A fork of it."""
        files = {path: set(contents) for path, contents in self.files.items()}
        return Known(child, since, set(self.states), files, set(self.brought))

    def may_have_run(self, token: str) -> None:
        """A cell's outcome is not known: it has run, or not, or was killed with its process."""
        self.states = self.states | {fold(state, token) for state in self.states} | {LOST}

    def may_be_lost(self) -> None:
        self.states = self.states | {LOST}

    def has_run(self, token: str, state: str, *, restarted: bool) -> None:
        """A cell ended as it should and printed `state`.  Raises: Wrong."""
        allowed = {fold(one, token) for one in (self.after_a_loss if restarted else self.states)}
        if state not in allowed:
            fresh = " (that of a new Python process, and nobody said so)" if state == fold(LOST, token) else ""
            raise Wrong(f"{self.id}: state {state}{fresh} after {token}, possible were {sorted(allowed)}")
        self.states, self.brought = {state}, set()

    @property
    def after_a_loss(self) -> set[str]:
        return {LOST, *self.brought}

    def restarted(self) -> None:
        """The daemon said that the Python process is a new one."""
        self.states = self.after_a_loss

    def become(self, winner: Known) -> None:
        self.states, self.files, self.born = winner.states, winner.files, winner.born
        self.brought = winner.brought

    def merge(self, other: Known) -> None:
        """Changes of `other` were brought in, or may have been."""
        # LOST: its process may be a new one, and what a new one lacks is removed here, too.
        self.states = self.states | other.states | {LOST}
        self.brought |= other.states
        for path, contents in other.files.items():
            self.files[path] = self.files.get(path, {None}) | contents

    def check_file(self, path: str, content: bytes | None) -> None:
        """Raises: Wrong."""
        allowed = self.files.get(path, {None})
        if content not in allowed:
            raise Wrong(f"{self.id}: {path} holds {_shown(content)}, possible were {sorted(map(_shown, allowed))}")
        self.files[path] = {content}


def _shown(content: bytes | None) -> str:
    return "nothing" if content is None else f"{len(content)} bytes {content[:40]!r}"
