"""The agent: one conversation with the host, one REPL, bash cells, file transfers; pid 1 duties.

One thread, one loop.  Everything is non-blocking and bounded: what user code does, floods or breaks may slow
its own sandbox down, but Interrupt and Kill always get through and the agent's memory does not grow.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from typing import Callable, List, NoReturn, Optional, Tuple, Union

from podflare.errors import ProtocolError
from podflare.guest import environment, files, processes, shell
from podflare.guest.interpreter import GuestBroken, Interpreter, describe_end
from podflare.guest.interrupts import INTERRUPT_SIGNAL
from podflare.guest.link import Connection, Link
from podflare.guest.output import Output, Stream
from podflare.guest.poller import READ, WRITE, Poller
from podflare.guest.supervision import Mark, Renew, SupervisorLine
from podflare.wire import frames
from podflare.wire.events import EXIT_INTERRUPTED
from podflare.wire.messages import (
    DIED,
    ENDED,
    INTERRUPTED,
    Cancel,
    DataEnd,
    Error,
    Exec,
    Exit,
    ForkComes,
    Interrupt,
    Kill,
    Ready,
    Result,
    Settle,
    ToolCall,
    ToolCancel,
    ToolResult,
    from_host,
    to_payload,
)
from podflare.wire.variables import ORDERS, VariablesCommit
from podflare.wire.version import PROTOCOL

BASH_GRACE_S = 0.25
"""A bash cell that was interrupted may run its traps for this long before it is killed with all it started."""
AGAIN_S = 0.25
"""After an interrupt, what a Python cell started meanwhile is ended, too."""
_MAX_UNREAD_BYTES = 32 * 1024 * 1024
"""Answers to tool calls that may wait for a REPL which does not read them."""
_SUPERVISED = 2**32 - 1
"""Channel number of what the supervisor orders; the host counts from 1."""
_LAST_READS = 64
"""Reads of what an ended REPL left in its socket; a process that it forked could write there for ever."""


def run(
    channel: Connection,
    *,
    home: str,
    before_repl: Callable[[], None],
    before_shell: Callable[[], None] = lambda: None,
    fork_line: Optional[int] = None,
    hand_over: Optional[Callable[[List[int]], None]] = None,
    carrier: Optional[int] = None,
    supervisor: Optional[socket.socket] = None,
) -> NoReturn:
    """Serve the host at the other end of `channel` until it closes it; then end every process below and exit.

    Called by the engine once the process is confined.  Sends Ready when the first REPL waits for cells.  Exit
    status 0 after the host's end, 1 if the guest cannot go on; then a line on standard error says why.

    Args:
        channel: one end of a connected stream; this process owns it from now on.
        home: home directory and first working directory of user code; exists.
        before_repl: called in every new REPL process before it does anything.
        before_shell: called in every process that is about to become a shell.
        fork_line: descriptor on which the REPL takes fork orders; None where the engine forks by other means.
        hand_over: the first REPL is forked from another machine's: see Interpreter.adopt.
        carrier: the first REPL is copied from another machine's: see Interpreter.await_carried.
        supervisor: SOCK_SEQPACKET socket to who copies whole machines (supervision.py); owned as `channel`, whose
            end is then not the end of this process, but the supervisor's is.
    """
    status = 1
    census: Optional[processes.Census] = None
    try:
        census = processes.Census()
        line = None if supervisor is None else SupervisorLine(supervisor)
        Agent(channel, census, home, before_repl, before_shell, fork_line, line).serve(hand_over, carrier)
        status = 0
    except (GuestBroken, ProtocolError) as exc:
        _complain(str(exc))
    except BaseException as exc:  # noqa: BLE001  # said aloud, then the machine ends
        _complain(f"{type(exc).__name__}: {exc}")
        sys.excepthook(type(exc), exc, exc.__traceback__)
    finally:
        if census is not None:
            census.end_all()
            census.wait_for_nested()
        os._exit(status)


def _complain(text: str) -> None:
    try:
        os.write(2, f"podflare agent: {text}\n".encode("utf-8", "replace"))
    except OSError:
        pass


_PYTHONS_OWN = {signal.SIGPIPE, signal.SIGXFSZ}
"""Which every Python ignores, and gives back to the programs that it starts."""


def _quiet_signals() -> int:
    """Be deaf to what user code may send; wake up, by the returned pipe, when a child ends."""
    wake_r, wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    # A daemon that a script starts in the background ignores SIGINT, SIGQUIT, perhaps SIGHUP: user code must not.
    for one in signal.valid_signals() - _PYTHONS_OWN:
        if signal.getsignal(one) is signal.SIG_IGN:
            signal.signal(one, signal.SIG_DFL)
    # INTERRUPT_SIGNAL for the moment between the fork of a REPL and its own handler.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, INTERRUPT_SIGNAL):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
    return wake_r


class _Cell:
    """The cell that runs now."""

    def __init__(self, channel: int, mark: processes.Mark, *, quiet: bool = False) -> None:
        self.channel = channel
        self.mark = mark
        self.quiet = quiet
        """An operation on variables: whatever is written meanwhile belongs to the next cell."""
        self.bash_pid = 0
        """0 for a Python cell."""
        self.interrupted = False
        self.killed = False
        self.ending = False
        """Its Exit waits for the last output to be sent."""
        self.timer: Optional[Tuple[float, Callable[["_Cell"], None]]] = None
        self.then: Optional[Callable[[], None]] = None
        """An order of the supervisor: called at its end, of which the host is not told."""

    def after(self, delay_s: float, action: Callable[["_Cell"], None]) -> None:
        self.timer = (time.monotonic() + delay_s, action)


class Agent:
    """State of one machine's guest."""

    def __init__(
        self,
        channel: Connection,
        census: processes.Census,
        home: str,
        before_repl: Callable[[], None],
        before_shell: Callable[[], None],
        fork_line: Optional[int] = None,
        supervisor: Optional[SupervisorLine] = None,
    ) -> None:
        environment.set_environment(home)
        self._supervisor = supervisor
        self._home = home
        self._before_shell = before_shell
        self._census = census
        self._host = Link(channel)
        self._output = Output()
        self._interpreter = Interpreter(self._output, census, home, before_repl, fork_line)
        self._forked = False
        """The first REPL has another machine's memory, and no fresh one will do instead."""
        self._adopted: Optional[int] = None
        """Pidfd of a REPL that is not a child of this process."""
        self._files = files.Transfers(self._host, home)
        self._cell: Optional[_Cell] = None
        self._ready_sent = False
        # Frames that must come after the output that was in the pipes when they were made: (kind, channel, payload).
        self._held: List[Tuple[int, int, bytes]] = []
        # Of that output, the bytes of each stream not read yet; None before they were counted.
        self._owed: Optional[List[int]] = None
        self._restarted = False
        """A REPL was lost and no Exit has told it yet."""
        self._poller = Poller()
        self._wake = _quiet_signals()
        self._stream_handlers = [self._stream_handler(stream) for stream in self._output.streams]

    def serve(self, hand_over: Optional[Callable[[List[int]], None]] = None, carrier: Optional[int] = None) -> None:
        """Until the host closes the channel.  Raises: GuestBroken; ProtocolError if the host breaks the protocol."""
        self._poller.watch(self._wake, READ, self._on_children)
        if self._supervisor is not None:
            self._poller.watch(self._supervisor.fileno(), READ, self._on_supervisor)
        self._forked = hand_over is not None or carrier is not None
        if carrier is not None:
            self._interpreter.await_carried(carrier)
        elif hand_over is None:
            self._interpreter.start()
        else:
            self._adopted = self._interpreter.adopt(hand_over)
            self._poller.watch(self._adopted, READ, self._on_adopted_end)
        try:
            while True:
                self._set_interest()
                self._poller.wait(self._timeout_s())
                self._run_timer()
                self._send_held()
                self._files.step()
        except EOFError:
            return

    def _set_interest(self) -> None:
        """What to wait for: with a full outbox nothing that would fill it more, but the host in any case."""
        host, link = self._host, self._interpreter.link
        if host.sock.fileno() >= 0:
            self._poller.watch(host.sock.fileno(), READ | (WRITE if host.queued else 0), self._on_host)
        take = 0 if host.full else READ
        for stream, handler in zip(self._output.streams, self._stream_handlers):
            self._poller.watch(stream.read_fd, take, handler)
        if link is not None:
            events = (0 if self._held else take) | (WRITE if link.queued else 0)
            self._poller.watch(link.sock.fileno(), events, self._on_interpreter)

    def _timeout_s(self) -> float:
        if self._files.can_step():
            return 0
        if self._cell is not None and self._cell.timer is not None:
            return max(0.0, self._cell.timer[0] - time.monotonic())
        return -1

    def _run_timer(self) -> None:
        cell = self._cell
        if cell is not None and cell.timer is not None and cell.timer[0] <= time.monotonic():
            action, cell.timer = cell.timer[1], None
            if not cell.ending:
                action(cell)

    # -- from the host

    def _on_host(self, events: int) -> None:
        if events & WRITE:
            self._host.flush()
        try:
            received = self._host.receive()
        except EOFError:
            if self._supervisor is None:
                raise
            self._leave_host()
            return
        for frame in received:
            if frame.kind == frames.DATA:
                if not self._pass_on(frame):
                    self._files.data(frame.channel, frame.payload)
                continue
            if frame.kind != frames.MESSAGE:
                raise ProtocolError(f"the host sent a frame of kind {frame.kind}")
            message = from_host(frame.payload)
            if isinstance(message, Exec):
                self._start_cell(frame, message)
            elif isinstance(message, ORDERS):
                self._start_operation(frame)
            elif isinstance(message, (Interrupt, Kill, ToolResult)):
                cell = self._cell
                # For a cell that has ended meanwhile it comes too late.
                if cell is not None and cell.channel == frame.channel and not cell.ending:
                    self._tell(cell, message, frame.payload)
            elif isinstance(message, VariablesCommit):
                self._pass_on(frame)
            elif isinstance(message, (ForkComes, Settle)):
                raise ProtocolError(f"{message.op!r} is not the host's to say")
            elif not (isinstance(message, (DataEnd, Cancel)) and self._pass_on(frame)):
                self._files.handle(frame.channel, message)

    def _pass_on(self, frame: frames.Frame) -> bool:
        """Give the REPL what belongs to the operation on variables that runs; False if it does not.

        It is never more than WINDOW_BYTES, as long as the REPL acknowledges nothing.
        """
        cell = self._cell
        if cell is None or not cell.quiet or cell.channel != frame.channel:
            return False
        if not cell.ending and self._interpreter.link is not None:
            self._interpreter.link.send(frame.kind, frame.channel, frame.payload)
        return True

    def _start_operation(self, frame: frames.Frame) -> None:
        if self._cell is not None:
            raise ProtocolError("the host sent an operation on variables while a cell runs")
        self._replace_dying()
        self._cell = _Cell(frame.channel, self._census.mark(), quiet=True)
        assert self._interpreter.link is not None
        self._interpreter.link.send(frames.MESSAGE, frame.channel, frame.payload)

    # -- from the supervisor

    def _on_supervisor(self, events: int) -> None:
        line = self._supervisor
        assert line is not None
        order = line.receive()
        if order is None:
            return
        if isinstance(order, Renew):
            self._leave_host()
            self._host = Link(order.channel, token=order.token)
            self._files = files.Transfers(self._host, self._home)
        if self._cell is not None:
            line.fail("a cell runs")
        elif isinstance(order, Mark):
            self._ask_interpreter(ForkComes(), lambda: line.answer("marked"))
        else:
            os.environ.update(order.environment)
            settle = Settle(reseed=order.reseed, environment=order.environment)
            self._ask_interpreter(settle, lambda: self._settled(line))

    def _leave_host(self) -> None:
        """What was under way with it is over: it went away, or this machine is a copy of one that goes on with it."""
        self._files.drop_all()
        if self._host.sock.fileno() >= 0:
            self._poller.forget(self._host.sock.fileno())
            self._host.sock.close()

    def _ask_interpreter(self, message: Union[ForkComes, Settle], then: Callable[[], None]) -> None:
        """Have the REPL do something of which the host knows nothing, then call `then`."""
        self._replace_dying()
        self._cell = _Cell(_SUPERVISED, self._census.mark(), quiet=True)
        self._cell.then = then
        assert self._interpreter.link is not None
        self._interpreter.link.send(frames.MESSAGE, _SUPERVISED, to_payload(message))

    def _settled(self, line: SupervisorLine) -> None:
        line.answer("renewed")
        if self._interpreter.python is not None:
            self._say_ready(self._interpreter.python)

    def _say_ready(self, python: str) -> None:
        self._ready_sent = True
        self._host.send(frames.MESSAGE, 0, to_payload(Ready(protocol=PROTOCOL, python=python)))

    def _replace_dying(self) -> None:
        """A REPL that has just died is replaced first, and does not take the next cell with it."""
        self._reap()
        while self._interpreter.link is None:
            # Its channel has ended and it was killed, but its threads take a moment to be gone.
            if self._adopted is not None:
                select.select([self._adopted], [], [])
                self._on_adopted_end(READ)
            else:
                os.waitid(os.P_PID, self._interpreter.pid, os.WEXITED | os.WNOWAIT)
                self._reap()

    def _start_cell(self, frame: frames.Frame, message: Exec) -> None:
        if self._cell is not None:
            raise ProtocolError("the host sent a cell while another one runs")
        self._replace_dying()
        cell = self._cell = _Cell(frame.channel, self._census.mark())
        for stream in self._output.streams:
            kept, dropped = stream.take_kept()
            if dropped:
                name = "stdout" if stream.kind == frames.STDOUT else "stderr"
                self._note(cell, f"{dropped} bytes of {name} from before this cell were dropped")
            if kept:
                self._host.send(stream.kind, cell.channel, kept)
        if message.language == "python":
            assert self._interpreter.link is not None
            self._interpreter.link.send(frames.MESSAGE, frame.channel, frame.payload)
            return
        try:
            pipes = self._output.stdout.write_fd, self._output.stderr.write_fd
            cell.bash_pid = shell.start(message.code, pipes, self._home, self._before_shell)
        except OSError as exc:
            self._note(cell, f"bash could not be started: {os.strerror(exc.errno or 0)}")
            self._end_cell(cell, shell.CANNOT_RUN, ENDED)

    def _tell(self, cell: _Cell, message: Union[Interrupt, Kill, ToolResult], payload: bytes) -> None:
        if isinstance(message, Kill):
            self._kill(cell)
        elif isinstance(message, Interrupt):
            self._interrupt(cell, payload)
        elif not cell.bash_pid and not cell.killed and self._interpreter.link is not None:
            if self._interpreter.link.queued <= _MAX_UNREAD_BYTES:
                self._interpreter.link.send(frames.MESSAGE, cell.channel, payload)
                return
            # It calls tools and does not read: its answers must not pile up here.
            self._say_aside("the Python process did not take the answers to its tool calls")
            self._kill(cell)

    def _interrupt(self, cell: _Cell, payload: bytes) -> None:
        first, cell.interrupted = not cell.interrupted, True
        if cell.bash_pid:
            processes.send_signal(-cell.bash_pid, signal.SIGINT)
            cell.after(BASH_GRACE_S, self._sweep)
            return
        # The message reaches a REPL that has not begun the cell yet, the signal one that has.  Once: a busy REPL does
        # not read, and any number of messages would wait for it here.
        if first and self._interpreter.link is not None:
            self._interpreter.link.send(frames.MESSAGE, cell.channel, payload)
        processes.send_signal(self._interpreter.pid, INTERRUPT_SIGNAL)
        self._sweep(cell)
        # It may have been on its way into system(3), which waits for its command before Python sees the signal.
        cell.after(AGAIN_S, self._sweep)

    def _kill(self, cell: _Cell) -> None:
        cell.killed = True
        if not cell.bash_pid:
            self._interpreter.kill()
        self._sweep(cell)

    def _sweep(self, cell: _Cell) -> None:
        """End everything that the cell started; for a bash cell that includes bash."""
        self._census.end_since(cell.mark, spare=(self._interpreter.pid,))

    # -- from below

    def _stream_handler(self, stream: Stream) -> Callable[[int], None]:
        def on_output(events: int) -> None:
            if not self._held:  # else _send_held reads, and how much matters
                data = stream.read()
                if self._cell is None or self._cell.quiet:
                    stream.keep(data)
                elif data:
                    self._host.send(stream.kind, self._cell.channel, data)

        return on_output

    def _on_interpreter(self, events: int) -> None:
        link = self._interpreter.link
        if link is None:
            return
        if events & WRITE:
            link.flush()
        if not events & ~WRITE:
            return
        try:
            self._take_from_interpreter()
        except EOFError:
            # Its process may live on without its end of the socket, deaf for ever.
            self._drop_interpreter_link()
            self._interpreter.kill()
        except ProtocolError as exc:
            self._drop_interpreter_link()
            self._interpreter.kill()
            self._say_aside(f"the Python process broke the protocol: {str(exc)[:500]}")

    def _take_from_interpreter(self) -> None:
        """Raises: EOFError when the REPL is gone; ProtocolError if it says what it may not say now."""
        cell = self._cell
        for frame, message in self._interpreter.receive():
            if cell is None or cell.bash_pid or cell.ending or frame.channel != cell.channel:
                raise ProtocolError(f"{message.op if message else frame.kind} for a cell that does not run")
            told_of_cell = isinstance(message, (Result, Error, ToolCall, ToolCancel))
            if not isinstance(message, Exit) and cell.quiet == told_of_cell:
                raise ProtocolError("the Python process mixed up a cell and an operation on variables")
            if isinstance(message, Exit):
                self._end_cell(cell, message.code, INTERRUPTED if message.reason == INTERRUPTED else ENDED)
            elif cell.quiet:
                self._host.send(frame.kind, cell.channel, frame.payload)
            else:
                self._hold(frames.MESSAGE, cell.channel, frame.payload)
        if self._interpreter.python is not None and not self._ready_sent:
            self._say_ready(self._interpreter.python)

    def _drop_interpreter_link(self) -> None:
        link = self._interpreter.link
        if link is not None:
            self._poller.forget(link.sock.fileno())
            self._interpreter.close_link()

    def _on_children(self, events: int) -> None:
        try:
            os.read(self._wake, 4096)
        except BlockingIOError:
            pass
        self._reap()

    def _reap(self) -> None:
        for pid, status in processes.reap():
            if pid == self._interpreter.pid:
                self._interpreter_ended(status)
            elif self._cell is not None and pid == self._cell.bash_pid:
                self._bash_ended(self._cell, status)

    def _on_adopted_end(self, events: int) -> None:
        assert self._adopted is not None
        pidfd, self._adopted = self._adopted, None
        self._poller.forget(pidfd)
        status = processes.exit_status_of(pidfd)
        os.close(pidfd)
        self._interpreter_ended(status)

    def _bash_ended(self, cell: _Cell, status: int) -> None:
        code, signal_number, _ = describe_end(status)
        if cell.killed or (signal_number and not cell.interrupted):
            self._end_cell(cell, code, DIED, signal_number)
        elif cell.interrupted:
            self._end_cell(cell, EXIT_INTERRUPTED if signal_number else code, INTERRUPTED)
        else:
            self._end_cell(cell, code, ENDED)

    def _interpreter_ended(self, status: int) -> None:
        """The REPL is gone: tell it, start another one."""
        code, signal_number, words = describe_end(status)
        if self._interpreter.link is not None:
            try:
                for _ in range(_LAST_READS):
                    self._take_from_interpreter()
            except (EOFError, ProtocolError):
                pass  # nothing more, or nothing that counts any more
        self._drop_interpreter_link()
        if self._forked and not self._ready_sent:
            raise GuestBroken(f"the forked Python process {words} before it was ready")
        self._restarted = True
        self._say_aside(f"the Python process {words}; a new one was started, all variables are lost")
        cell = self._cell
        self._interpreter.start()
        if cell is not None and not cell.bash_pid and not cell.ending:
            self._end_cell(cell, code, DIED, signal_number)

    # -- to the host

    def _note(self, cell: _Cell, text: str) -> None:
        self._host.send(frames.STDERR, cell.channel, f"podflare: {text}\n".encode())

    def _say_aside(self, text: str) -> None:
        """A line on stderr of the running cell, after its output so far; of the next one if none runs."""
        line = f"podflare: {text}\n".encode()
        if self._cell is None or self._cell.ending or self._cell.quiet:
            self._output.stderr.keep(line)
        else:
            self._hold(frames.STDERR, self._cell.channel, line)

    def _hold(self, kind: int, channel: int, payload: bytes) -> None:
        """Send a frame after the output that was written before now."""
        self._held.append((kind, channel, payload))
        self._owed = None

    def _end_cell(self, cell: _Cell, code: int, reason: str, signal_number: int = 0) -> None:
        """The cell is over; its Exit goes out after its last output."""
        if cell.interrupted or cell.killed:
            self._sweep(cell)  # once more: what it started after the first time
        if cell.then is not None:
            self._cell = None
            cell.then()
            return
        cell.ending = True
        cell.timer = None
        restarted = self._restarted
        if not cell.quiet:
            self._restarted = False  # of an operation nobody but the host reads it
        last = Exit(code=code, reason=reason, restarted=restarted, signal=signal_number)
        self._hold(frames.MESSAGE, cell.channel, to_payload(last))

    def _send_held(self) -> None:
        """Output that is owed first, then what was held back for it; as far as the outbox takes it."""
        if not self._held:
            return
        channel = self._held[0][1]
        if self._owed is None:
            self._owed = self._output.backlog()
        owed = self._owed
        for number, stream in enumerate(self._output.streams):
            while owed[number]:
                if self._host.full:
                    return
                data = stream.read(owed[number])
                # User code can read its own pipe empty through /proc/self/fd; then nothing is owed any more.
                owed[number] = owed[number] - len(data) if data else 0
                if self._cell is not None and self._cell.quiet:
                    stream.keep(data)
                elif data:
                    self._host.post(stream.kind, channel, data)
        for kind, to, payload in self._held:
            self._host.post(kind, to, payload)
        self._host.flush()
        self._held.clear()
        if self._cell is not None and self._cell.ending:
            self._cell = None
