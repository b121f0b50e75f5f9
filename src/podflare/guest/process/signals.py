"""The family's judgement on signals: none from a sandbox to its forks.

A PID namespace shows the processes of those below it, so a parent has numbers for its forks' processes and could end
them.  The calls that send signals ask the family first (seccomp_unotify(2)), which lets them go on, refuses them with
EPERM, or carries them out itself where the kernel would reach the forks, too.

As long as nothing was forked every call goes on unseen.  The family trusts nothing that the caller says: it reads the
numbers in the kernel's copy of the call, and looks them up in the caller's own /proc.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import select
import signal
import struct
from typing import Dict, Iterator, List, Optional, Set, Tuple

from podflare.guest import syscalls as sc

_KILL, _THREAD, _THREAD_OF, _PIDFD, _OWNER = "kill", "thread", "thread of", "pidfd", "owner"
_CALLS: Dict[int, str] = {
    "x86_64": {62: _KILL, 200: _THREAD, 129: _THREAD, 234: _THREAD_OF, 297: _THREAD_OF, 424: _PIDFD, 72: _OWNER},
    "aarch64": {129: _KILL, 130: _THREAD, 138: _THREAD, 131: _THREAD_OF, 240: _THREAD_OF, 424: _PIDFD, 25: _OWNER},
}.get(platform.machine(), {})
"""kill; tkill and rt_sigqueueinfo; tgkill and rt_tgsigqueueinfo; pidfd_send_signal; fcntl(F_SETOWN)."""

_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, _SEND
_NOTICE = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif with struct seccomp_data
_ANSWER = struct.Struct("=QqiI")  # struct seccomp_notif_resp
_GO_ON = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE


class Warden:
    """Answers for all machines of one family.  Its owner polls `listeners` and calls `serve`."""

    def __init__(self) -> None:
        self.listeners: Set[int] = set()
        self._proc: Optional[str] = None

    def machines_are_nested(self) -> None:
        """From now on numbers are looked up: a fork is about to be made.  Idempotent.

        Mounts a /proc that shows the family's own PID namespace.
        """
        if self._proc is None:
            sc.unshare(sc.CLONE_NEWNS)
            sc.mount("proc", "/proc", "proc", sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC)
            self._proc = "/proc"

    def serve(self, listener: int) -> bool:
        """Answer what waits there.  False, and the listener is closed, when nobody is left who could ask."""
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        events = poll.poll(0)
        if events and events[0][1] & select.POLLIN:
            self._answer(listener)
        elif events:
            self.listeners.discard(listener)
            os.close(listener)
            return False
        return True

    def _answer(self, listener: int) -> None:
        notice = bytearray(_NOTICE.size)
        try:
            fcntl.ioctl(listener, _RECEIVE, notice)
        except OSError:
            return  # who asked has been killed meanwhile
        number, pid, _, call, _, _, *arguments = _NOTICE.unpack(notice)
        error, flags = 0, _GO_ON
        if self._proc is not None:
            try:
                error, flags = self._judge(pid, _CALLS.get(call, ""), arguments)
            except OSError:
                error, flags = errno.EPERM, 0  # it cannot be looked at: refused
        try:
            fcntl.ioctl(listener, _SEND, _ANSWER.pack(number, 0, -error, flags))
        except OSError:
            pass  # as above

    def _judge(self, pid: int, call: str, arguments: List[int]) -> Tuple[int, int]:
        """(error, flags) of the answer."""
        first, second, third = (_signed(value) for value in arguments[:3])
        asker = _numbers(self._folder(pid))
        if not asker or asker[-1] == 1:
            return 0, _GO_ON  # an agent, which counts its own
        if call == _PIDFD:
            return _send_by_pidfd(asker, pid, first, second)
        with _Folder(f"{self._proc}/{pid}/root/proc") as processes:
            if call == _KILL and first == -1:
                return processes.send_to_all(second, but=_numbers(self._folder(pid), b"NStgid:")[-1])
            named = {_KILL: [first], _THREAD: [first], _THREAD_OF: [first, second], _OWNER: [third]}.get(call)
            if named is None or any(processes.is_anothers(number) for number in named):
                return errno.EPERM, 0
        return 0, _GO_ON

    def _folder(self, pid: int) -> int:
        return os.open(f"{self._proc}/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


class _Folder:
    """The /proc of a machine."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> "_Folder":
        return self

    def __exit__(self, *failure: object) -> None:
        os.close(self._fd)

    def _open(self, pid: int) -> Optional[int]:
        try:
            return os.open(str(pid), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._fd)
        except OSError:
            return None

    def is_anothers(self, number: int) -> bool:
        """Whether a process or, by a negative number, a process group is of a machine below this one."""
        if number in (0, -1):
            return number == -1
        folder = self._open(abs(number))
        if folder is not None:
            return len(_numbers(folder)) > 1
        return number < 0 and any(_group_of(fd) == -number for _, fd in self._others(nested=True))

    def _others(self, *, nested: bool) -> Iterator[Tuple[int, int]]:
        """(pid, descriptor of its directory, open until the next step) of all that are nested, or not."""
        for name in os.listdir(self._fd):
            folder = self._open(int(name)) if name.isdigit() else None
            if folder is None:
                continue
            try:
                if (len(_numbers(os.dup(folder))) > 1) == nested:
                    yield int(name), folder
            finally:
                os.close(folder)

    def send_to_all(self, number: int, *, but: int) -> Tuple[int, int]:
        """kill(-1) for this machine alone: everybody who is there but its agent and who asks.

        Not repeated for what appears meanwhile: it could be what the agent starts in the place of what was killed.
        """
        if not 0 <= number <= 64:
            return errno.EINVAL, 0
        found = False
        for pid, folder in self._others(nested=False):
            if pid not in (1, but):
                found = True
                _send(folder, number)
        return (0, 0) if found else (errno.ESRCH, 0)


def _send_by_pidfd(asker: List[int], pid: int, fd: int, number: int) -> Tuple[int, int]:
    """pidfd_send_signal: done here, for the caller could put another process behind the descriptor meanwhile."""
    if not 0 <= number <= 64:
        return errno.EINVAL, 0
    holder = os.pidfd_open(pid)
    try:
        target = sc.pidfd_getfd(holder, fd)
    finally:
        os.close(holder)
    try:
        numbers = _numbers_behind(target)
        if not numbers or len(numbers) > len(asker) or numbers[-1] == 1:
            return errno.EPERM, 0
        return _send(target, number), 0
    finally:
        os.close(target)


def _numbers_behind(target: int) -> List[int]:
    """The numbers of the process behind a pidfd, as `_numbers`; [] for another kind of descriptor or a dead process."""
    with open(f"/proc/self/fdinfo/{target}") as file:
        for line in file:
            if line.startswith("NSpid:"):
                return [int(word) for word in line.split()[1:]]
    return []


def _send(target: int, number: int) -> int:
    """0 or an errno."""
    try:
        signal.pidfd_send_signal(target, number)
    except OSError as exc:
        return exc.errno or errno.EPERM
    return 0


def _signed(value: int) -> int:
    """The int of which the kernel takes the low half of a register."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def _numbers(folder: int, of: bytes = b"NSpid:") -> List[int]:
    """The numbers of a process in the PID namespace of its /proc and those below (NSpid, proc_pid_status(5)).

    Args:
        folder: descriptor of its directory in /proc; closed here.
        of: NSpid of the thread, or NStgid of its process.
    Returns: [] if it is gone.
    """
    try:
        with open(os.open("status", os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder), "rb") as file:
            for line in file:
                if line.startswith(of):
                    return [int(word) for word in line.split()[1:]]
    except OSError:
        pass
    finally:
        os.close(folder)
    return []


def _group_of(folder: int) -> int:
    """The process group, as /proc shows it; 0 if the process is gone."""
    try:
        with open(os.open("stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder), "rb") as file:
            text = file.read()
    except OSError:
        return 0
    return int(text[text.rfind(b")") + 2 :].split()[2])
