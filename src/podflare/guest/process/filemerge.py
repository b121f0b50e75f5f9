"""The work of one merge of files: a plan, our files changed after it, and back again unless that is kept.

Runs in a process that looks at layers first and then joins the machine's mount namespace.  Knows nothing of who orders
it, and how.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any, Dict, List, Optional, Sequence, Tuple

from podflare.guest import syscalls as sc
from podflare.guest.process.changeover import Changeover
from podflare.guest.process.compare import GONE, TooMuch
from podflare.guest.process.mergebase import Places
from podflare.guest.process.room import Outgrown, Room
from podflare.guest.process.threeway import MAX_TEXT_BYTES, Action, ThreeWay, Unit
from podflare.guest.process.transplant import Changed

MAX_ERROR_CHARS = 2000
TIDY_S = 20.0
"""For removing what lies beside at the end; running code can put more into it all the time."""
_SLACK_ENTRIES = 1000
_SLACK_BYTES = 64 * 1024 * 1024
Part = Tuple[str, str, str, str]
"""(overlay, its template directory, its mount point, path), as compare.overlays_of tells them."""


class TimeIsUp(Exception):
    """What `stop` raises."""


def stop(number: int, frame: Optional[FrameType]) -> None:
    """The handler of SIGALRM in a process that merges."""
    raise TimeIsUp


def failure(exc: BaseException) -> Dict[str, str]:
    """What went wrong, for whoever asked: {"error": text, "kind"}."""
    if isinstance(exc, Changed):
        return {"error": f"{exc} was changed by running code meanwhile", "kind": "changed"}
    if isinstance(exc, Outgrown):
        return {"error": str(exc), "kind": "changed"}
    if isinstance(exc, TooMuch):
        return {"error": str(exc), "kind": "too_much"}
    if isinstance(exc, TimeIsUp):
        return {"error": "it took too long", "kind": "time"}
    kind = "changed" if isinstance(exc, OSError) and exc.errno in GONE else "failed"
    return {"error": f"{type(exc).__name__}: {exc}"[:MAX_ERROR_CHARS], "kind": kind}


class FileMerge:
    """What one merge holds while it is on its way: `plan`, `apply`, perhaps `keep`, and `end` in any case."""

    def __init__(
        self,
        overlays: Sequence[Part],
        chains: Tuple[Sequence[str], Sequence[str], Sequence[str]],
        mount_namespace: int,
        *,
        text_bytes: int = MAX_TEXT_BYTES,
    ) -> None:
        """Args:
        overlays: all of a machine.
        chains: names of the layers of base, ours, theirs, topmost first.
        mount_namespace: of the machine that is to be changed.
        text_bytes: of merged texts, at most.
        """
        self._namespace = mount_namespace
        self._three = ThreeWay(*chains, text_bytes=text_bytes)
        lowers = {name: lower for name, lower, _, _ in overlays}
        self.mounts = {name: mounted for name, _, mounted, _ in overlays}
        """Where each overlay is mounted in the machine."""
        self._base = Places(chains[0], lowers)
        self._theirs = Places(chains[2], lowers)
        self._over: Optional[Changeover] = None
        self._kept = False

    @property
    def units(self) -> List[Unit]:
        return self._three.units

    @property
    def places(self) -> Tuple[Places, Places]:
        """What base and theirs show."""
        return self._base, self._theirs

    def plan(self, parts: Sequence[Part]) -> Dict[str, Any]:
        """Plan for these parts of the overlays.  Returns: the plan, as JSON can have it.  Raises: OSError, TooMuch."""
        for overlay, lower, mounted, path in parts:
            self._three.overlay(overlay, lower, mounted, path)
        return {
            "merged": sorted({path for unit in self.units if not unit.why for path in unit.paths}),
            "conflicts": [
                {
                    "name": unit.path,
                    "paths": unit.paths,
                    "if_ours": unit.paths if unit.if_ours is not None else [],
                    "why": unit.why,
                    "ours": unit.sides[0],
                    "theirs": unit.sides[1],
                    "version": unit.version,
                }
                for unit in sorted(self.units, key=lambda unit: unit.path)
                if unit.why
            ],
            "skipped": sorted(set(self._three.skipped)),
            "bytes": sum(unit.size for unit in self.units),
            "touched": len(self.units),
        }

    def apply(self, decisions: Dict[str, str]) -> None:
        """Change our files.  Args: decisions: of each conflict "ours" or "theirs", by path.

        Raises: OSError, Changed, Outgrown; then nothing has changed, or the message says what could not be undone.
        """
        actions: List[Tuple[str, Action]] = []
        for unit in self.units:
            action = unit.action
            if unit.why:
                action = unit.if_theirs if decisions[unit.path] == "theirs" else unit.if_ours
            if action is not None:
                actions.append((unit.overlay, action))
        if not actions:
            return
        for overlay in {overlay for overlay, _ in actions}:
            self._theirs.stack(overlay)  # while it can still be reached by path
        self._join()
        over = self._over = Changeover(self.mounts)
        room = self.room()
        for overlay, action in actions:
            over.prepare(overlay, action, self._theirs, room)
        signal.setitimer(signal.ITIMER_REAL, 0)  # from here on it is renames only, and a half of them is no good
        try:
            over.apply()
        except BaseException as exc:
            problems = over.undo()
            if problems:
                raise OSError(f"{exc}; and what was done could not all be undone: {problems[0]}") from exc
            raise

    def room(self) -> Room:
        """For one copy of what was there when it was planned."""
        entries, size = sum(unit.entries for unit in self.units), sum(unit.size for unit in self.units)
        return Room(2 * entries + _SLACK_ENTRIES, 2 * size + _SLACK_BYTES)

    def _join(self) -> None:
        # Nothing may be imported any more: the files of that name are the sandbox's.
        sys.path[:] = []
        sc.setns(self._namespace, sc.CLONE_NEWNS)
        # As much as a root directory's owner needs to come past modes; in the machine's user namespace only.
        sc.set_capabilities(*([(sc.CAP_DAC_OVERRIDE, sc.CAP_FOWNER)] * 2))

    def keep(self) -> None:
        self._kept = True

    def end(self) -> None:
        """Undo what is not kept, and tidy up."""
        if self._over is not None:
            if not self._kept:
                self._over.undo()
            try:
                signal.setitimer(signal.ITIMER_REAL, TIDY_S)
                self._over.finish()
            except TimeIsUp:
                pass  # the rest stays, where the code that made it sees it
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
