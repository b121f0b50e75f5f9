"""The REPL's fork into other namespaces: how one Python process becomes n more, each in a machine of its own.

Only the process that holds the memory can fork it copy on write, so the REPL does it, between two cells, on its
main thread, when the daemon orders it over the fork line.  The daemon does not trust the result: it looks at each
child from outside before it lets it go.

Order on the line, a SOCK_SEQPACKET socket, all JSON: n times {"order", "child": i} with ChildFds, then {"order",
"fork": n, "reseed", "timeout_s"}; answer {"order", "forked": bool}.  Or {"order", "carry": true, "reseed", "timeout_s"}
with a socket, for a copy where no fork can reach (passage.py); answered alike.  An order may be given up half way; then
another number follows.  A REPL that replaces one that ended says {"started"} first.  Each child says {"born": report}
on the line of its own machine and waits for "go".
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from typing import Any, Callable, Dict, List, Optional, TypeVar

from podflare.guest import databases, inheritance, randomness
from podflare.guest import syscalls as sc
from podflare.guest.stdio import high_copy

MAX_PACKET_BYTES = 64 * 1024
HELLO = b"!"
"""A child's first byte to its agent, which learns from it, by SCM_CREDENTIALS, the child's pid."""

# Bound before user code can put something else in their place.
_fork, _exit, _waitpid, _kill = os.fork, os._exit, os.waitpid, os.kill


class ChildFds:
    """The descriptors of one machine that waits for its REPL, in the order of their packet."""

    COUNT = 10
    NAMESPACES = (
        sc.CLONE_NEWPID,
        sc.CLONE_NEWCGROUP,
        sc.CLONE_NEWIPC,
        sc.CLONE_NEWUTS,
        sc.CLONE_NEWNET,
        sc.CLONE_NEWNS,
    )

    def __init__(self, fds: List[int]) -> None:
        if len(fds) != self.COUNT:
            raise ValueError(f"{len(fds)} descriptors instead of {self.COUNT}")
        self.namespaces = fds[:6]
        self.control, self.stdout, self.stderr, self.line = fds[6:]

    def all(self) -> List[int]:
        return [*self.namespaces, self.control, self.stdout, self.stderr, self.line]

    def close(self) -> None:
        for fd in self.all():
            os.close(fd)


class ForkLine:
    """The REPL's end of its fork line."""

    def __init__(self, fd: int) -> None:
        self.fd = high_copy(fd)
        self._waiting: List[ChildFds] = []
        self._order = 0
        self.forking = False
        """True while a fork of ours runs: hooks that user forks trigger must keep still."""

    def wait(
        self,
        link_fd: int,
        branch: Callable[[List[ChildFds], bool, float], None],
        depart: Callable[[int, bool, float], None],
    ) -> None:
        """Return when `link_fd` has something to read; meanwhile obey the line."""
        while True:
            poll = select.poll()
            poll.register(link_fd, select.POLLIN)
            poll.register(self.fd, select.POLLIN)
            ready = {fd for fd, _ in poll.poll()}
            if self.fd in ready:
                self._obey(branch, depart)
            elif link_fd in ready:
                return

    def _obey(
        self, branch: Callable[[List[ChildFds], bool, float], None], depart: Callable[[int, bool, float], None]
    ) -> None:
        with socket.socket(fileno=os.dup(self.fd)) as line:
            data, fds, _, _ = socket.recv_fds(line, MAX_PACKET_BYTES, ChildFds.COUNT)
        if not data:
            os._exit(0)  # the daemon is gone
        order = json.loads(data)
        if order["order"] != self._order:
            for child in self._waiting:
                child.close()
            self._waiting, self._order = [], order["order"]
        if "child" in order:
            self._waiting.append(ChildFds(fds))
            return
        if "carry" in order:
            depart(fds[0], bool(order["reseed"]), float(order["timeout_s"]))
            return
        children, self._waiting = self._waiting, []
        if len(children) != order["fork"]:
            self.answer(False, "descriptors are missing")
            return
        branch(children, bool(order["reseed"]), float(order["timeout_s"]))

    def answer(self, forked: bool, why: str = "") -> None:
        """In the parent: how the order ended."""
        self.say({"order": self._order, "forked": forked, "why": why})

    def say(self, message: Dict[str, object]) -> None:
        os.write(self.fd, json.dumps(message).encode()[:MAX_PACKET_BYTES])

    def say_started(self) -> None:
        """This REPL takes the place of one that ended: an order to that one is not for its state."""
        with socket.socket(fileno=os.dup(self.fd)) as line:
            try:
                line.send(json.dumps({"started": True}).encode(), socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass  # nobody forks here, and many restarts have said so already

    def close(self) -> None:
        os.close(self.fd)


def fork_children(children: List[ChildFds], timeout_s: float) -> "Optional[ChildFds]":
    """Fork this process into every machine of `children`.

    Returns: None in the parent; in a child its own ChildFds, with the child inside its new namespaces.
    Raises: OSError in the parent if not all were forked within timeout_s (user code runs in hooks of os.fork);
        what was forked is ended by the daemon.
    """

    def fork_all() -> "Optional[ChildFds]":
        for child in children:
            sc.setns(child.namespaces[0], sc.CLONE_NEWPID)  # where the next fork is born
            if _fork() == 0:
                return child
        return None

    return _fork_from_middle(fork_all, timeout_s)


def fork_aside(timeout_s: float) -> bool:
    """Fork this process where it is.  True in the copy.  Raises: as `fork_children`."""
    return bool(_fork_from_middle(lambda: None if _fork() else True, timeout_s))


Forked = TypeVar("Forked")


def _fork_from_middle(fork_all: "Callable[[], Optional[Forked]]", timeout_s: float) -> "Optional[Forked]":
    """Call `fork_all` in a middle process, whose end makes its children orphans: the parent's wait() must not see them.

    Returns: None in the parent; what `fork_all` returned in a child that it forked.
    """
    middle = _fork()
    if middle == 0:
        try:
            forked = fork_all()
            if forked is not None:
                return forked
        except BaseException as exc:  # noqa: BLE001  # nothing may return into the parent's code
            os.write(2, f"podflare: fork: {type(exc).__name__}: {exc}\n".encode())
            _exit(1)
        _exit(0)
    pidfd = os.pidfd_open(middle)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    in_time = bool(poll.poll(int(timeout_s * 1000)))
    if not in_time:
        _kill(middle, signal.SIGKILL)
    os.close(pidfd)
    _, status = _waitpid(middle, 0)
    if status != 0:
        raise OSError("the children could not be forked" + ("" if in_time else f" within {timeout_s:g} s"))
    return None


class Newborn:
    """A child's way from fork to its first cell.  Built before the fork, used after it."""

    def __init__(self, reseed: bool) -> None:
        self._cwd = _cwd()
        self._random = randomness.Keep() if not reseed else None
        self._threads = _thread_names()
        self._processes = _count_children()
        self._duplicates = inheritance.find_duplicates()
        self._shm = os.open("/dev/shm", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def forget(self) -> None:
        """In the parent."""
        os.close(self._shm)

    def look(self, ours: "set[int]") -> "Dict[str, object]":
        """Before it leaves its parent's machine: what it holds of it.  Tells what will be lost.

        Args:
            ours: descriptors that belong to the REPL itself and are dealt with by the caller.
        """
        self._inherited = inheritance.survey(ours | {self._shm}, self._duplicates)
        return {"threads": self._threads, "processes": self._processes, **self._inherited.losses()}

    def enter(self, mine: ChildFds) -> None:
        """Move into the machine of `mine`."""
        for fd, kind in zip(mine.namespaces[1:], ChildFds.NAMESPACES[1:]):
            sc.setns(fd, kind)

    def settle(self) -> "List[str]":
        """After the daemon's go: own files, shared memory, directory, randomness.  Returns notes on what went wrong."""
        notes = inheritance.copy_shared_memory(self._shm)
        os.close(self._shm)
        notes += self._inherited.make_independent()
        notes += databases.reconnect()
        try:
            os.chdir(self._cwd)
        except OSError as exc:
            notes.append(f"the working directory {self._cwd} is not there any more ({exc.strerror})")
        if self._random is not None:
            self._random.restore()
        else:
            randomness.reseed()
        return notes


def _cwd() -> str:
    try:
        return os.getcwd()
    except OSError:
        return "/root"  # removed by user code


def _thread_names() -> List[str]:
    threading: Any = sys.modules.get("threading")
    try:
        main = threading.main_thread()
        return [str(thread.name)[:100] for thread in threading.enumerate()[:64] if thread is not main]
    except Exception:  # noqa: BLE001  # not imported, or replaced by user code
        return []


def _count_children() -> int:
    """Living children of this process; they stay with it."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return len(file.read().split())
    except OSError:
        return 0
