"""Carries a REPL's memory into a machine that its fork cannot reach: one whose PID namespace is not below its own.

A fork is born in its parent's PID namespace or below, and the kernel nests 32 of them.  So from some generation on a
REPL is copied instead of forked: into a process of a new machine directly below the family, which was forked from the
same zygote and so has the same program at the same addresses.  Whoever is carried takes part (guest/passage.py): both
sides wait in a read of their socket to this process; the copy is made from outside.

Runs in a process of the family.  Reads memory that user code wrote, and interprets none of it but the list of
descriptors, which is checked.  It takes these itself: a process in which user code runs may not be able to send any, as
the kernel counts those that are on their way for all processes of one user id (SCM_RIGHTS, unix(7)).
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import struct
from contextlib import closing
from typing import Any, Dict, List, NoReturn, Tuple

from podflare.guest import syscalls as sc
from podflare.guest.process.memory import become
from podflare.guest.process.tracee import Tracee

MAX_PACKET_BYTES = 64 * 1024
FDS_PER_PACKET = 200
MAX_FDS = 16384
_PROC = "/new"
_SOURCE, _TARGET = "the copy of the sandbox's Python process", "the new machine's process"


def run_carrier(source: int, target: int, answer: int, timeout_s: float) -> NoReturn:
    """Carry the REPL at the other end of the socket `source` into the process at the end of `target`.

    On both the kernel states who sends (SO_PASSCRED, unix(7)).

    Tells {"error": null, "bytes": n} or {"error": text} on the socket `answer`.  The source is ended in any case; the
    target if it failed.  Dies with both when timeout_s are over.
    """
    with socket.socket(fileno=answer) as teller:
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, timeout_s)
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # also for those on their way
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
            # Its own mount of /proc, which shows the family's PID namespace.
            sc.unshare(sc.CLONE_NEWNS)
            sc.mount("proc", _PROC, "proc", sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC)
            with socket.socket(fileno=source) as ours, socket.socket(fileno=target) as theirs:
                written = _carry(ours, theirs)
            report: Dict[str, Any] = {"error": None, "bytes": written}
        except BaseException as exc:
            report = {"error": f"{type(exc).__name__}: {exc}"[:2000]}
        try:
            teller.send(json.dumps(report).encode())
        except OSError:
            pass  # the daemon gave it up
    os._exit(0)


class _Peers:
    """Who takes part, by pid: held by pidfds, so that nobody else's pid is meant when it is used."""

    def __init__(self) -> None:
        self._pidfds: Dict[int, int] = {}

    def note(self, pid: int) -> bool:
        """False if it has ended already."""
        if pid not in self._pidfds:
            try:
                self._pidfds[pid] = os.pidfd_open(pid)
            except ProcessLookupError:
                return False
        return True

    def stop(self, pid: int, reads: int) -> Tracee:
        """See Tracee.  Raises: OSError if the pid is not theirs any more."""
        tracee = Tracee(pid, _PROC, reads=reads)
        poll = select.poll()
        poll.register(self._pidfds[pid], select.POLLIN)
        if poll.poll(0):
            tracee.close()
            raise OSError("a process that was to be carried ended")
        return tracee

    def descriptor(self, pid: int, number: int) -> int:
        """A copy of one of its descriptors.  Raises: OSError."""
        return sc.pidfd_getfd(self._pidfds[pid], number)

    def spare(self, pid: int) -> None:
        os.close(self._pidfds.pop(pid))

    def end(self) -> None:
        for pidfd in self._pidfds.values():
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass


def _carry(source: socket.socket, target: socket.socket) -> int:
    peers = _Peers()
    try:
        hello, waiting_pid = _receive(target, peers, _TARGET)
        if hello.get("waits") is not True:
            raise OSError(f"{_TARGET} does not wait for its memory")
        frozen_pid, number = _pass_descriptors(source, target, peers)
        placed, pid = _receive(target, peers, _TARGET)
        if pid != waiting_pid:
            raise OSError(f"{_TARGET} did not take the descriptors")
        with closing(peers.stop(frozen_pid, number)) as frozen, closing(peers.stop(waiting_pid, number)) as waiting:
            _compare(frozen, waiting)
            written = become(frozen, waiting)
            waiting.release()
        peers.spare(waiting_pid)
        target.send(json.dumps({"own": placed["own"]}).encode())
        return written
    finally:
        peers.end()  # the frozen copy in any case; if it failed, everybody who took part


def _pass_descriptors(source: socket.socket, target: socket.socket, peers: _Peers) -> Tuple[int, int]:
    """Pass on what the source has open.  Returns its pid and the number of the descriptor on which it now waits."""
    first, pid = _receive(source, peers, _SOURCE)
    if first.get("leaves") is not True:
        raise OSError(f"{_SOURCE} sent something else than itself")
    count = 0
    while True:
        message, sender = _receive(source, peers, _SOURCE)
        listed = message.get("numbers")
        if sender != pid or not isinstance(listed, list) or len(listed) > FDS_PER_PACKET:
            raise OSError(f"{_SOURCE} sent a wrong list of descriptors")
        count += len(listed)
        if count > MAX_FDS:
            raise OSError(f"more than {MAX_FDS} descriptors")
        numbers = [(_number(fd), closes is True) for fd, closes in listed]
        body: Dict[str, Any] = {"numbers": numbers}
        last = "socket" in message
        if last:
            body["socket"] = _number(message["socket"])
        elif not numbers:
            raise OSError(f"{_SOURCE} sent an empty list of descriptors")
        fds: List[int] = []
        try:
            fds += (peers.descriptor(pid, number) for number, _ in numbers)
            socket.send_fds(target, [json.dumps(body).encode()], fds)
        finally:
            for fd in fds:
                os.close(fd)
        if last:
            return pid, int(body["socket"])


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MAX_FDS:
        raise OSError(f"{_SOURCE} sent a wrong number of a descriptor")
    return value


def _receive(sock: socket.socket, peers: _Peers, who: str) -> "Tuple[Dict[str, Any], int]":
    """One JSON packet and the sender's pid as the kernel states it (noted in `peers`).

    Raises: OSError with what `who` says went wrong there; OSError, ValueError for anything else.
    """
    # Without room for descriptors the kernel hands none over.
    data, ancillary, _, _ = sock.recvmsg(MAX_PACKET_BYTES, socket.CMSG_SPACE(struct.calcsize("3i")))
    if not data:
        raise OSError(f"{who} ended before it was copied")
    pid = 0
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            pid = int(struct.unpack("3i", content[: struct.calcsize("3i")])[0])
    if not pid:
        raise OSError(f"{who} has no number here")  # it is of another PID namespace
    ended = not peers.note(pid)
    message = json.loads(data)
    if not isinstance(message, dict):
        raise ValueError(f"{who} sent no object")
    if "failed" in message:
        raise OSError(f"{who}: {str(message['failed'])[:500]}")
    if ended:
        raise OSError(f"{who} ended before it was copied")
    return message, pid


def _compare(source: Tracee, target: Tracee) -> None:
    """Refuse what would lose a wall: filters that user code loaded for itself do not come along."""
    ours, theirs = source.status(), target.status()
    for name in ("Seccomp_filters", "NoNewPrivs"):
        if ours.get(name) != theirs.get(name):
            raise OSError(
                f"the sandbox's Python process has {name} {ours.get(name)} and the new one {theirs.get(name)}"
            )
    if ours.get("Threads") != "1" or theirs.get("Threads") != "1":
        raise OSError("a process that was to be carried has threads")
