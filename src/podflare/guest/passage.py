"""What a REPL does itself when its memory is carried into another machine (guest/process/carry.py).

Two processes take part.  A frozen copy of the REPL says what it has open and waits, for ever; a process of the new
machine puts that at the same descriptor numbers and waits as well.  The latter then has the memory of the former and
goes on in its place: in `leave`, which returns in the new machine only.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import socket
import stat
from typing import Any, Dict, List, NoReturn, Tuple

from podflare.guest import syscalls as sc
from podflare.guest.descriptors import close_all_but
from podflare.guest.stdio import high_copy

FDS_PER_PACKET = 200
"""Below SCM_MAX_FD (unix(7))."""
MAX_PACKET_BYTES = 64 * 1024
_HIGH = 600
OWN = ("control", "stdout", "stderr", "line")
_LIMITS = (resource.RLIMIT_STACK, resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_CPU)

_read, _exit = os.read, os._exit


class Process:
    """What the kernel keeps of a process besides memory and descriptors; read before, restored after."""

    def __init__(self) -> None:
        self._actions = sc.signal_actions()
        self._stack = sc.signal_stack()
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self._umask = os.umask(0)
        os.umask(self._umask)
        self._nice = os.getpriority(os.PRIO_PROCESS, 0)
        self._limits = [(kind, resource.getrlimit(kind)) for kind in _LIMITS]

    def restore(self) -> None:
        os.umask(self._umask)
        for kind, limits in self._limits:
            resource.setrlimit(kind, limits)
        os.setpriority(os.PRIO_PROCESS, 0, self._nice)
        sc.set_signal_stack(self._stack)
        sc.set_signal_actions(self._actions)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)


def leave(sock: int) -> Dict[str, int]:
    """In the frozen copy, on the socket to the carrier.  Returns in the new machine.

    Returns: the numbers of the descriptors by which the new machine's agent and daemon are reached, by OWN.
    Precondition: this process has one thread.
    """
    process = Process()
    with socket.socket(fileno=os.dup(sock)) as line:
        line.send(b'{"leaves": true}')
        files, others = _open_descriptors({sock, line.fileno()})
        for start in range(0, len(files), FDS_PER_PACKET):
            part = files[start : start + FDS_PER_PACKET]
            line.send(json.dumps({"numbers": [[fd, _closes(fd)] for fd in part]}).encode())
        line.send(json.dumps({"numbers": [], "socket": sock}).encode())
    # In this call one process becomes the other.  It sees an interrupted call and makes it again (PEP 475).
    arrival: Dict[str, Any] = json.loads(_read(sock, MAX_PACKET_BYTES) or b"{}")
    if "own" not in arrival:
        _exit(1)  # it was given up, or the copy is not needed any more
    _occupy(others)
    process.restore()
    return {name: int(arrival["own"][name]) for name in OWN}


def tell_failure(sock: int, exc: BaseException) -> None:
    """On a socket to the carrier: why the process at this end takes no part any more."""
    try:
        os.write(sock, json.dumps({"failed": f"{type(exc).__name__}: {exc}"[:500]}).encode())
    except Exception:  # noqa: BLE001, S110  # the carrier is gone, or user code has broken a module: then it finds the end
        pass


def _open_descriptors(but: "set[int]") -> Tuple[List[int], List[int]]:
    """Descriptors whose content the new process needs (files, directories, devices); and the others."""
    files: List[int] = []
    others: List[int] = []
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            mode = os.fstat(fd).st_mode
        except OSError:
            continue  # the descriptor of the listing itself
        if fd not in but:
            wanted = stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISCHR(mode)
            (files if wanted else others).append(fd)
    return files, others


def _occupy(numbers: List[int]) -> None:
    """What was not brought along keeps its number, so that nothing else gets it before it is replaced."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for number in numbers:
        if number != null:
            os.dup2(null, number, inheritable=False)
    if null not in numbers:
        os.close(null)


def _closes(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC)


def await_memory(sock: int, own: Dict[str, int]) -> NoReturn:
    """In the process of the new machine: take the other's descriptors over, then wait to be overwritten.

    Args:
        sock: to the carrier.
        own: the descriptors, by OWN, that this process needs afterwards.
    """
    carrier = sock
    try:
        carrier = high_copy(sock)
        close_all_but({0, 1, 2, carrier, *own.values()})
        line = socket.socket(fileno=carrier)
        line.send(b'{"waits": true}')
        incoming: List[Tuple[int, bool, int]] = []
        while True:
            data, fds, _, _ = socket.recv_fds(line, MAX_PACKET_BYTES, FDS_PER_PACKET)
            message = json.loads(data)
            incoming += [(number, closes, fd) for (number, closes), fd in zip(message["numbers"], fds)]
            if "socket" in message:
                break
        carrier = -1  # its number may be another descriptor's in a moment
        placed = _place(line.detach(), message["socket"], own, incoming)
        carrier = message["socket"]
        os.write(carrier, json.dumps({"placed": len(incoming), "own": placed}).encode())
        _read(carrier, MAX_PACKET_BYTES)
    except BaseException as exc:  # noqa: BLE001  # nothing may return into the agent's code
        tell_failure(carrier, exc)
    _exit(1)
    raise AssertionError  # for the type checker, which does not know _exit under this name


def _place(line: int, line_number: int, own: Dict[str, int], incoming: List[Tuple[int, bool, int]]) -> Dict[str, int]:
    """Give every descriptor its number.  Returns those of `own`, which lie above all others."""
    base = max([line_number, *(number for number, _, _ in incoming), _HIGH]) + 1
    moved = {fd: _move(fd, base) for fd in (line, *own.values(), *(fd for _, _, fd in incoming))}
    for number, closes, fd in incoming:
        os.dup2(moved[fd], number, inheritable=not closes)
        os.close(moved[fd])
    os.dup2(moved[line], line_number, inheritable=False)
    os.close(moved[line])
    return {name: moved[fd] for name, fd in own.items()}


def _move(fd: int, base: int) -> int:
    copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, base)
    os.close(fd)
    return copy
