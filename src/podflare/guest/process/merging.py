"""One merge of files, from the daemon's order to its end: a process of the family that is there for so long.

Order: {"base", "ours", "theirs": names of layers, topmost first, "paths", "timeout_s", "former", "layer"} with the
descriptors of a SOCK_SEQPACKET socket and of our machine's mount namespace.  On the socket then, each answer being
{"error": null or text, "kind"}:

1. Answer, with a descriptor of the plan: JSON in a file in memory.
2. From the daemon {"apply": true} with a descriptor of decisions, a JSON object path -> "ours" or "theirs"; answer.
3. From the daemon {"keep": true}; answer.  Whatever else ends the conversation undoes all.

Nobody in the machine sees this process or can signal it: it stays in the family's PID namespace.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
from types import FrameType
from typing import Any, Dict, List, Optional, Tuple

from podflare.guest import syscalls as sc
from podflare.guest.process.changeover import Changeover
from podflare.guest.process.compare import GONE, TooMuch, overlays_of
from podflare.guest.process.mergebase import Places, write_base
from podflare.guest.process.room import Outgrown, Room
from podflare.guest.process.threeway import Action, ThreeWay
from podflare.guest.process.transplant import Changed
from podflare.wire.plan import StagePlan

MAX_ERROR_CHARS = 2000
MAX_WORD_BYTES = 4096
TIDY_S = 20.0
"""For removing what lies beside at the end; running code can put more into it all the time."""
_SLACK_ENTRIES = 1000
_SLACK_BYTES = 64 * 1024 * 1024


class _TimeIsUp(Exception):
    pass


def answer_merge(stage: StagePlan, order: Dict[str, Any], fds: List[int]) -> None:
    """Carry the order out, in a process of its own."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGALRM, _stop)
    os.umask(0)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with socket.socket(fileno=os.dup(fds[0])) as sock:
        merge = _Merge(stage, order, fds[1])
        try:
            if _step(sock, merge.plan, order["timeout_s"]):
                word, told = _hear(sock)
                if word.get("apply") and _step(sock, lambda: merge.apply(told), word["timeout_s"]):
                    word, _ = _hear(sock)
                    if word.get("keep"):
                        merge.keep()
                        sock.send(b'{"error": null}')
        finally:
            merge.end()


def _stop(number: int, frame: Optional[FrameType]) -> None:
    raise _TimeIsUp


def _step(sock: socket.socket, action: Any, timeout_s: float) -> bool:
    """Answer with the outcome of a step.  Returns whether it was done."""
    try:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            made = action()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        socket.send_fds(sock, [b'{"error": null}'], [] if made is None else [made])
        return True
    except Changed as exc:
        answer = {"error": f"{exc} was changed by running code meanwhile", "kind": "changed"}
    except Outgrown as exc:
        answer = {"error": str(exc), "kind": "changed"}
    except TooMuch as exc:
        answer = {"error": str(exc), "kind": "too_much"}
    except _TimeIsUp:
        answer = {"error": "it took too long", "kind": "time"}
    except BaseException as exc:
        kind = "changed" if isinstance(exc, OSError) and exc.errno in GONE else "failed"
        answer = {"error": f"{type(exc).__name__}: {exc}"[:MAX_ERROR_CHARS], "kind": kind}
    sock.send(json.dumps(answer).encode())
    return False


def _hear(sock: socket.socket) -> Tuple[Dict[str, Any], Dict[str, str]]:
    """The daemon's next word, and what it passed along; nothing at the end."""
    data, fds, _, _ = socket.recv_fds(sock, MAX_WORD_BYTES, 1)
    told: Dict[str, str] = {}
    for fd in fds:
        with os.fdopen(fd, "rb") as file:
            file.seek(0)
            told = json.loads(file.read())
    return (json.loads(data) if data else {}), told


class _Merge:
    """What one merge holds while it is on its way."""

    def __init__(self, stage: StagePlan, order: Dict[str, Any], mount_namespace: int) -> None:
        self._stage = stage
        self._order = order
        self._namespace = mount_namespace
        self._three = ThreeWay(order["base"], order["ours"], order["theirs"])
        overlays = list(overlays_of(stage, ["/"]))
        lowers = {name: lower for name, lower, _, _ in overlays}
        self._mounts = {name: mounted for name, _, mounted, _ in overlays}
        self._base = Places(order["base"], lowers)
        self._theirs = Places(order["theirs"], lowers)
        self._over: Optional[Changeover] = None
        self._kept = False

    def plan(self) -> int:
        """Returns: a descriptor of the plan as the daemon is told."""
        for overlay, lower, mounted, path in overlays_of(self._stage, self._order["paths"]):
            self._three.overlay(overlay, lower, mounted, path)
        body = {
            "merged": sorted({path for unit in self._three.units if not unit.why for path in unit.paths}),
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
                for unit in sorted(self._three.units, key=lambda unit: unit.path)
                if unit.why
            ],
            "skipped": sorted(set(self._three.skipped)),
            "bytes": sum(unit.size for unit in self._three.units),
            "touched": len(self._three.units),
        }
        made = os.memfd_create("merge", os.MFD_CLOEXEC)
        with os.fdopen(os.dup(made), "wb") as file:
            file.write(json.dumps(body).encode())
        return made

    def apply(self, decisions: Dict[str, str]) -> None:
        """Write the next base, then change our files."""
        units = self._three.units
        layer, former = self._order["layer"], self._order["former"]
        write_base(layer, former, units, self._base, self._theirs, self._mounts, self._room())
        actions: List[Tuple[str, Action]] = []
        for unit in units:
            action = unit.action
            if unit.why:
                action = unit.if_theirs if decisions[unit.path] == "theirs" else unit.if_ours
            if action is not None:
                actions.append((unit.overlay, action))
        if not actions:
            return
        for overlay in {overlay for overlay, _ in actions}:
            self._theirs.stack(overlay)  # while the stage can still be reached by path
        self._join()
        over = self._over = Changeover(self._mounts)
        room = self._room()
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

    def _room(self) -> Room:
        """For one copy of what was there when it was planned."""
        units = self._three.units
        entries, size = sum(unit.entries for unit in units), sum(unit.size for unit in units)
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
            except _TimeIsUp:
                pass  # the rest stays, where the code that made it sees it
