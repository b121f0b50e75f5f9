"""Which processes live below the agent, which of them a cell started, and how to end those.

Reads /proc.  Knows nothing of cells but the mark that the agent takes when one starts.
"""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import time
from dataclasses import dataclass
from typing import Container, Dict, List, Optional, Set, Tuple

from podflare.guest import syscalls

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_GENTLE_ROUNDS = 8
"""Rounds of killing, each of which found new processes, before a population counts as a fork bomb."""
_MAX_ROUNDS = 200
_DYING_S = 0.1
_DYING_POLL_S = 0.0005
_PIDFD_GET_INFO = 0xC040FF0B  # _IOWR(0xFF, 11, 64 bytes)
_PIDFD_INFO_EXIT = 1 << 3
_REAP_WAITS = 100
_SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class Mark:
    """A moment.  Start times are coarse, so the last pid given out separates the processes of one tick."""

    ticks: int
    last_pid: int


@dataclass(frozen=True)
class Process:
    """One row of /proc/<pid>/stat."""

    pid: int
    parent: int
    state: str
    started_ticks: int

    @property
    def identity(self) -> Tuple[int, int]:
        """Not used again when the pid is."""
        return self.pid, self.started_ticks


class Census:
    """Looks at the processes below the calling one, which becomes the reaper of all of them."""

    def __init__(self) -> None:
        self.root = os.getpid()
        if self.root != 1:
            syscalls.set_child_subreaper()
        self._loadavg = os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)

    def mark(self) -> Mark:
        """Now."""
        ticks = time.clock_gettime_ns(time.CLOCK_BOOTTIME) * _TICKS_PER_S // 1_000_000_000
        # proc_loadavg(5): the last field is the pid most recently given out in the reader's pid namespace.
        return Mark(ticks, int(os.pread(self._loadavg, 128, 0).rsplit(None, 1)[1]))

    def descendants(self) -> List[Process]:
        """Every process below this one that has not ended."""
        table = _table()
        nested = self._nested(table)
        children: Dict[int, List[int]] = {}
        for process in table.values():
            children.setdefault(process.parent, []).append(process.pid)
        found: List[Process] = []
        stack = list(children.get(self.root, ()))
        if self.root == 1:
            # A REPL forked into this PID namespace has its parent outside, which proc_pid_stat(5) shows as 0.
            stack += children.get(0, ())
        while stack:
            pid = stack.pop()
            if pid == self.root or pid in nested:
                continue
            stack += children.get(pid, ())
            if table[pid].state not in "ZX":
                found.append(table[pid])
        return found

    def end_since(self, mark: Mark, *, spare: Container[int] = ()) -> bool:
        """SIGKILL every descendant that started after `mark`, but those in `spare`, until there is none.

        Waits for those that take long to die only so long that the caller can still answer in time; a process with
        SIGKILL pending runs no code of its own and cannot fork.

        Returns: False if they multiplied faster than they could be killed one by one; then everything in the PID
            namespace was killed, `spare` and older processes included (as pid 1), or some may be left (otherwise).
        """
        killed: Set[Tuple[int, int]] = set()
        rounds = 0
        give_up_at = time.monotonic() + _DYING_S
        while True:
            fresh = [p for p in self.descendants() if p.pid not in spare and _is_newer(p, mark)]
            alive = [p for p in fresh if p.identity not in killed]
            if not fresh or (not alive and time.monotonic() > give_up_at):
                return True
            if not alive:
                time.sleep(_DYING_POLL_S)
                continue
            rounds += 1
            if rounds > (_GENTLE_ROUNDS if self._may_kill_all() else _MAX_ROUNDS):
                break
            for process in alive:
                _kill(process.pid)
                killed.add(process.identity)
            give_up_at = time.monotonic() + _DYING_S
        if self._may_kill_all():
            _kill(-1)  # kill(2): everybody but pid 1, at one moment, so that no child escapes
        return False

    def end_all(self) -> None:
        """SIGKILL everything below this process."""
        if self._may_kill_all():
            _kill(-1)
        else:
            self.end_since(Mark(-1, -1))

    def _may_kill_all(self) -> bool:
        """Whether kill(-1) from here ends this machine's processes and nobody else's."""
        return self.root == 1 and not self._nested()

    def _nested(self, table: Optional[Dict[int, Process]] = None) -> Set[int]:
        """First processes of machines that were forked from this one: of another PID namespace below this one.

        They are children of this process, or, for a moment that can be long on a busy computer, still of who makes
        them: a process that came from outside, as they did, and ends when it has made them.
        """
        table = _table() if table is None else table
        parents = {self.root}
        if self.root == 1:
            outsiders = {process.pid for process in table.values() if not process.parent}
            # Or of one that ended while the table was made.
            ended = {process.parent for process in table.values() if process.parent not in table}
            parents |= outsiders | ended
        return {
            process.pid
            for process in table.values()
            if process.parent in parents and process.pid != self.root and _is_nested(process.pid)
        }

    def wait_for_nested(self) -> None:
        """Return when no machine that was forked from this one is left: their end would come with this process's.

        Precondition: `end_all`; nobody uses this machine's shared memory any more, and it is given back at once.
        """
        if self.root == 1 and self._nested():
            _empty(_SHARED_MEMORY)
            while self._nested():
                try:
                    os.waitpid(-1, 0)
                except ChildProcessError:
                    time.sleep(_DYING_POLL_S)  # until who made them has ended, and they are this process's


def _empty(folder: str) -> None:
    """Remove all that a directory holds, as far as that is possible."""
    try:
        for path, folders, files in os.walk(folder, topdown=False):
            for name in files:
                os.unlink(f"{path}/{name}")
            for name in folders:
                whole = f"{path}/{name}"
                os.unlink(whole) if os.path.islink(whole) else os.rmdir(whole)
    except (OSError, RecursionError):
        pass


def reap() -> List[Tuple[int, int]]:
    """(pid, wait status) of every child that ended, orphans of the sandbox included."""
    ended: List[Tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended.append((pid, status))


def exit_status_of(pidfd: int) -> int:
    """Wait status of an ended process that is another one's child.

    The kernel tells it since 6.15 (PIDFD_GET_INFO); before that it counts as killed.
    """
    # The kernel has it from the moment on when the parent has reaped the process, for which there is no event.
    for _ in range(_REAP_WAITS):
        info = bytearray(struct.pack("QQ", _PIDFD_INFO_EXIT, 0) + bytes(48))  # struct pidfd_info, 64 bytes
        try:
            fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
        except OSError:
            break
        if struct.unpack_from("Q", info)[0] & _PIDFD_INFO_EXIT:
            return int(struct.unpack_from("i", info, 60)[0])
        time.sleep(0.001)
    return int(signal.SIGKILL)


def _is_nested(pid: int) -> bool:
    """Whether the process lives in a PID namespace below the reader's (NSpid, proc_pid_status(5))."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            return any(line.startswith(b"NSpid:") and len(line.split()) > 2 for line in file)
    except OSError:
        return False


def send_signal(pid: int, number: int) -> None:
    """Signal a process or, with a negative pid, a group.  One that is gone already is no error."""
    while True:
        try:
            return os.kill(pid, number)
        except InterruptedError:
            continue  # a child ended while the family was asked (process/signals.py)
        except (ProcessLookupError, PermissionError):
            return None


def _kill(pid: int) -> None:
    send_signal(pid, signal.SIGKILL)


def _is_newer(process: Process, mark: Mark) -> bool:
    if process.started_ticks == mark.ticks:
        return process.pid > mark.last_pid
    return process.started_ticks > mark.ticks


def _table() -> Dict[int, Process]:
    """Every process that is seen from here, by pid."""
    listed = (_read_stat(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return {process.pid: process for process in listed if process is not None}


def _read_stat(pid: int) -> "Process | None":
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return None  # ended between listing and reading
    # proc_pid_stat(5): the name stands in parentheses and may hold anything, parentheses too.
    fields = text[text.rfind(b")") + 2 :].split()
    return Process(pid, int(fields[1]), fields[0].decode("ascii"), int(fields[19]))
