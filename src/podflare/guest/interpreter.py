"""The agent's side of the REPL: start it by fork, talk to it, start it anew when it is gone.

What comes from it was written by a process in which user code runs, so it is decoded as strictly as the host
decodes what comes from us.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import time
from typing import Callable, List, Optional, Tuple, Union

from podflare.errors import ProtocolError
from podflare.guest import passage, processes, repl
from podflare.guest.link import Link
from podflare.guest.output import Output
from podflare.wire import frames
from podflare.wire.messages import Ack, Error, Exit, Ready, Result, ToolCall, ToolCancel, from_guest
from podflare.wire.variables import ANSWERS, VariablesAnswer

CellMessage = Union[Result, Error, ToolCall, ToolCancel, Exit]
"""What the REPL may say of a cell."""
ReplMessage = Union[CellMessage, VariablesAnswer, Ack]
"""What it may say of a cell or of an operation on variables."""

MAX_FAILED_STARTS = 3
ADOPT_TIMEOUT_S = 60.0
"""Longer than the daemon waits for a fork; then it ends this machine."""
_SITE_STARTS = 2
"""So many failed starts may be the fault of the user's own site configuration; then it is left out."""
_FORK_TRIES = 50
_FORK_WAIT_S = 0.01


class GuestBroken(Exception):
    """No REPL can be started: the machine is of no more use."""


class Interpreter:
    """The one REPL of the machine."""

    def __init__(
        self,
        output: Output,
        census: processes.Census,
        home: str,
        before_repl: Callable[[], None],
        fork_line: Optional[int] = None,
    ) -> None:
        self._fork_line = fork_line
        self._output = output
        self._census = census
        self._home = home
        self._before_repl = before_repl
        self._failed_starts = 0
        self.pid = 0
        self.python: Optional[str] = None
        """Version of the template's interpreter, from the moment on when the REPL waits for cells."""
        self.link: Optional[Link] = None

    def start(self) -> None:
        """Fork a REPL.  Does not wait for it; cells sent before it is ready wait in its socket.

        Precondition: this process has one thread.
        Raises: GuestBroken after MAX_FAILED_STARTS starts in a row that never got ready, or if fork is not possible.
        """
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise GuestBroken(f"the Python process ended {self._failed_starts} times before it was ready")
        self._failed_starts += 1
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            pid = self._fork()
            if pid == 0:
                ours.detach()  # closed with everything else; the object must not close that number again
                repl.main(
                    theirs,
                    (self._output.stdout.write_fd, self._output.stderr.write_fd),
                    home=self._home,
                    before_repl=self._before_repl,
                    with_site=self._failed_starts <= _SITE_STARTS,
                    first=self.python is None and self._failed_starts == 1,
                    fork_line=self._fork_line,
                )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.pid, self.link = pid, Link(ours)

    def adopt(self, hand_over: Callable[[List[int]], None]) -> int:
        """Take in a REPL that is forked elsewhere into this machine, instead of starting one.

        Args:
            hand_over: passes on the descriptors with which that REPL speaks: control socket, stdout, stderr.
        Returns: a pidfd of it: it is another process's child, so that its end is not seen by reaping.
        Raises: GuestBroken if none came.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            hand_over([theirs.fileno(), self._output.stdout.write_fd, self._output.stderr.write_fd])
        ours.settimeout(ADOPT_TIMEOUT_S)
        size = struct.calcsize("3i")
        try:
            hello, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(size))
        except OSError as exc:
            raise GuestBroken(f"no forked Python process came: {exc}") from exc
        if not hello or not ancillary:
            raise GuestBroken("the forked Python process did not come")
        self.pid = int(struct.unpack("3i", ancillary[0][2][:size])[0])
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        self.link = Link(ours)
        return os.pidfd_open(self.pid)

    def await_carried(self, carrier: int) -> None:
        """Fork a process into which a REPL's memory is carried (passage.py), instead of starting a REPL.

        Args:
            carrier: socket to the process that carries it; closed here.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        assert self._fork_line is not None
        pid = self._fork()
        if pid == 0:
            try:
                os.setsid()
                self._before_repl()
                stdout, stderr = self._output.stdout.write_fd, self._output.stderr.write_fd
                own = {"control": theirs.fileno(), "stdout": stdout, "stderr": stderr, "line": self._fork_line}
                passage.await_memory(carrier, own)
            except BaseException as exc:  # noqa: BLE001  # nothing may return into the agent's code
                passage.tell_failure(carrier, exc)
            finally:
                os._exit(1)
        theirs.close()
        os.close(carrier)
        self.pid, self.link = pid, Link(ours)

    def _fork(self) -> int:
        for _ in range(_FORK_TRIES):
            try:
                return os.fork()
            except OSError as exc:
                if exc.errno not in (errno.EAGAIN, errno.ENOMEM):
                    raise
            # Background processes of the user hold the whole process limit or memory: the REPL goes first.
            self._census.end_all()
            time.sleep(_FORK_WAIT_S)  # the kernel frees what was killed in its own time; nothing tells when
            processes.reap()
        raise GuestBroken("no process can be started any more")

    def receive(self) -> List[Tuple[frames.Frame, Optional[ReplMessage]]]:
        """What the REPL says, as it came and decoded (None for DATA); Ready is taken out and noted.

        Raises: EOFError when the REPL is gone; ProtocolError if it sent anything else.
        """
        assert self.link is not None
        checked: List[Tuple[frames.Frame, Optional[ReplMessage]]] = []
        for frame in self.link.receive():
            if frame.kind == frames.DATA:
                checked.append((frame, None))
                continue
            if frame.kind != frames.MESSAGE:
                raise ProtocolError(f"the Python process sent a frame of kind {frame.kind}")
            message = from_guest(frame.payload)
            if isinstance(message, Ready):
                self._failed_starts = 0
                self.python = message.python
            elif isinstance(message, (Result, Error, ToolCall, ToolCancel, Exit, Ack, *ANSWERS)):
                checked.append((frame, message))
            else:
                raise ProtocolError(f"the Python process sent {message.op!r}")
        return checked

    def kill(self) -> None:
        """SIGKILL; the end is seen by reaping."""
        processes.send_signal(self.pid, signal.SIGKILL)

    def close_link(self) -> None:
        """After its end: forget the channel."""
        if self.link is not None:
            self.link.sock.close()
            self.link = None


def describe_end(status: int) -> Tuple[int, int, str]:
    """(exit code as a shell gives it, signal or 0, words) of a wait status."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        return 128 + number, number, f"was ended by {name}"
    code = os.WEXITSTATUS(status)
    return code, 0, f"exited with status {code}"
