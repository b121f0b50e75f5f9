"""A merge of files into this machine: a child of the first process, from the first order of it to its end.

The first process passes orders on and answers back (`Job`).  Orders, each {"order": number, "merge": one of}:

- {"put": {"layer", "rows"}}, {"write": {"layer", "pieces"}}, {"check": marks}: what is to be merged (staging.py);
- {"plan": {"paths", "timeout_s"}}: the answer is {"plan": ...} (guest/process/filemerge.py);
- {"decide": {path: "ours" or "theirs"}}, any number of times, then {"apply": {"timeout_s"}}, and {"keep": true};
- {"end": true}: undoes what was not kept.  So does the end of the conversation.

Nobody in the sandbox sees this process or can signal it: it is in no PID namespace of theirs, and in none of their
groups.  It has all rights in the machine until it joins the sandbox's files, where two capabilities are left.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
from typing import Any, Dict, List, Optional, Sequence

from podflare.guest.descriptors import close_all_but
from podflare.guest.process.filemerge import FileMerge, Part, failure, stop
from podflare.guest.vm import control
from podflare.guest.vm.staging import BASE, LOWER, OURS, OVERLAY, THEIRS, Staging

SEND_TIMEOUT_S = 20.0
MAX_TEXT_BYTES = 32 * 1024 * 1024
"""Of merged texts, which are held in the memory that is the machine's own."""
_READ_BYTES = 256 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Job:
    """One merge under way, as the first process has it."""

    count = 0

    def __init__(self) -> None:
        """Raises: OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            if os.fork() == 0:
                try:
                    signal.set_wakeup_fd(-1)
                    close_all_but({0, 1, 2, theirs.fileno()})
                    _serve(theirs)
                finally:
                    os._exit(0)
        ours.setblocking(False)
        self._sock = ours
        self._asked: Any = None
        self._is_last = False
        Job.count += 1
        self.number = Job.count

    def fileno(self) -> int:
        return self._sock.fileno()

    def tell(self, number: Any, line: bytes, *, last: bool) -> None:
        """Pass an order on.

        Args: last: it is the one to end, whose answer is the end.
        Raises: OSError if the process is gone, or does not listen.
        """
        self._asked, self._is_last = number, last
        self._sock.settimeout(SEND_TIMEOUT_S)
        try:
            self._sock.sendall(line + b"\n")
        finally:
            self._sock.setblocking(False)

    def hear(self) -> Optional[bytes]:
        """What it has answered; None if nothing has come; at its end what is left to answer, and `ended`."""
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if data:
            if data.endswith(b"\n"):
                self._asked = None
            return data
        number, self._asked = self._asked, None
        self._sock.close()
        if number is None:
            return b""
        died = {"failed": "the process that merges files died"}
        return control.encode(number, {} if self._is_last else died)

    @property
    def ended(self) -> bool:
        return self._sock.fileno() < 0


def _serve(sock: socket.socket) -> None:
    signal.signal(signal.SIGALRM, stop)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.umask(0)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    merge = _Merge()
    lines = control.Lines()
    try:
        while not merge.ended:
            data = sock.recv(_READ_BYTES)
            if not data:
                break
            for order in map(json.loads, lines.feed(data)):
                answer = _answer(merge, order)
                if not merge.ended:
                    sock.sendall(answer)
    finally:
        merge.end()


def _answer(merge: _Merge, order: Dict[str, Any]) -> bytes:
    try:
        body = merge.obey(order["merge"])
    except BaseException as exc:  # noqa: BLE001  # told as it is
        body = {"problem": failure(exc)}
        if isinstance(exc, OSError) and exc.errno in _FULL:
            body["problem"]["kind"] = "full"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return control.encode(order["order"], body)


class _Merge:
    """What one merge holds while it is on its way."""

    def __init__(self) -> None:
        self._staging: Optional[Staging] = None
        self._work: Optional[FileMerge] = None
        self._decisions: Dict[str, str] = {}
        self.ended = False

    def obey(self, order: Dict[str, Any]) -> Dict[str, Any]:
        """Carry one order out.  Raises: whatever went wrong."""
        if self._staging is None and "end" not in order:
            self._staging = Staging()
        if "put" in order:
            self._place().put(order["put"]["layer"], order["put"]["rows"])
        elif "write" in order:
            self._place().write(order["write"]["layer"], order["write"]["pieces"])
        elif "plan" in order:
            return {"plan": self._plan(order["plan"])}
        elif "check" in order:
            self._place().check(order["check"])
        elif "decide" in order:
            self._decisions.update(order["decide"])
        elif "apply" in order:
            signal.setitimer(signal.ITIMER_REAL, order["apply"]["timeout_s"])
            assert self._work is not None
            self._work.apply(self._decisions)
        elif "keep" in order:
            if self._work is not None:
                self._work.keep()
        else:
            self.end()
        return {}

    def _place(self) -> Staging:
        assert self._staging is not None
        return self._staging

    def _plan(self, order: Dict[str, Any]) -> Dict[str, Any]:
        signal.setitimer(signal.ITIMER_REAL, order["timeout_s"])
        chains = ((BASE, OURS), (OURS,), (THEIRS, BASE, OURS))
        self._work = FileMerge([_part("/")], chains, self._place().machine, text_bytes=MAX_TEXT_BYTES)
        return self._work.plan(_parts(order["paths"]))

    def end(self) -> None:
        """Undo what is not kept, and take the place away."""
        self.ended = True
        if self._work is not None:
            self._work.end()
        if self._staging is not None:
            self._staging.end()
            self._staging = None


def _part(path: str) -> Part:
    return OVERLAY, LOWER, "/", path


def _parts(paths: Sequence[str]) -> List[Part]:
    return [_part(path) for path in paths]
