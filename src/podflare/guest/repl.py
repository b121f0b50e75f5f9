"""The REPL process: reads cells from the agent, runs them in one namespace, reports how they ended.

Output does not pass through here: it goes to the pipes behind file descriptors 1 and 2.  User code shares this
process and may break anything in it; what must hold whatever happens is the agent's business.
"""

from __future__ import annotations

import _thread
import builtins
import json
import os
import platform
import select
import signal
import socket
import sys
from typing import Any, Callable, Dict, List, NoReturn, Optional, Tuple

from podflare.guest import display, environment, namespace, passage, randomness, tracebacks
from podflare.guest.branch import HELLO, ChildFds, ForkLine, Newborn, fork_aside, fork_children
from podflare.guest.cells import NO_VALUE, Awaiter, Compiler, exit_status
from podflare.guest.descriptors import close_all_but
from podflare.guest.interrupts import InterruptGate
from podflare.guest.stdio import StandardStreams, high_copy
from podflare.guest.tools import ToolCalls
from podflare.guest.variables.operations import Operations
from podflare.wire import frames
from podflare.wire.events import EXIT_INTERRUPTED
from podflare.wire.messages import (
    ENDED,
    INTERRUPTED,
    Error,
    Exec,
    Exit,
    ForkComes,
    Message,
    Ready,
    Result,
    Settle,
    from_host,
    to_payload,
)
from podflare.wire.variables import ORDERS, VariablesOrder
from podflare.wire.version import PROTOCOL


def main(
    control: socket.socket,
    output: Tuple[int, int],
    *,
    home: str,
    before_repl: Callable[[], None],
    with_site: bool,
    first: bool = False,
    fork_line: Optional[int] = None,
) -> NoReturn:
    """Turn this freshly forked child of the agent into a REPL and serve until the agent goes away.

    Args:
        control: the REPL's end of the socket pair with its agent.
        output: writing ends of the pipes for stdout and stderr.
        before_repl: the engine's last step of confinement; if it raises, this process ends.
        with_site: see namespace.open_paths.
        first: no other REPL, and so no user code, ran in this machine before.
        fork_line: the guest's end of the fork line, where the engine has one (branch.py).
    """
    status = 1
    try:
        os.setsid()
        before_repl()
        line = None if fork_line is None else ForkLine(fork_line)
        if line is not None and not first:
            line.say_started()
        link = _AgentLink(_take_over_descriptors(control, output, line))
        _default_signals()
        environment.enter_home(home)
        repl = Repl(link, StandardStreams(), line)
        namespace.hide_bundle()
        namespace.open_paths(with_site=with_site, prepared=first)
        randomness.reseed()  # of what was imported before this machine was made, which all others have, too
        repl.serve()
        status = 0
    except BaseException as exc:  # noqa: BLE001  # whatever it is, this must not return into the agent's code
        try:
            os.write(2, f"podflare: the Python process could not go on: {type(exc).__name__}: {exc}\n".encode())
        except OSError:
            pass
    finally:
        os._exit(status)


def _take_over_descriptors(control: socket.socket, output: Tuple[int, int], line: Optional[ForkLine]) -> int:
    """Put standard streams on 0, 1, 2, the control socket high up; close everything else of the agent."""
    control_fd = high_copy(control.detach())
    keep = {0, 1, 2, control_fd} | (set() if line is None else {line.fd})
    null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    for fd, source in enumerate((null, *output)):
        os.dup2(source, fd)
    os.set_blocking(control_fd, True)
    close_all_but(keep)
    return control_fd


def _default_signals() -> None:
    """Undo what the agent ignores: a process that user code starts must be as any other."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


class _AgentLink:
    """The blocking half of the control channel."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._decoder = frames.Decoder()
        self._received: List[frames.Frame] = []
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    def next_frame(self) -> Optional[frames.Frame]:
        """The next frame; None when the agent is gone."""
        while not self._received:
            data = os.read(self.fd, 65536)
            if not data:
                return None
            self._received = self._decoder.feed(data)
        return self._received.pop(0)

    @property
    def empty(self) -> bool:
        """Whether no frame has been received that was not taken yet."""
        return not self._received

    def has_more(self) -> bool:
        """Whether the agent sent something that was not read yet."""
        return bool(self._received) or bool(self._poll.poll(0))

    def send(self, channel: int, *messages: Message) -> None:
        data = memoryview(b"".join(frames.encode(frames.MESSAGE, channel, to_payload(m)) for m in messages))
        while data:
            data = data[os.write(self.fd, data) :]

    def send_data(self, channel: int, data: memoryview) -> None:
        """One DATA frame."""
        rest = memoryview(frames.encode(frames.DATA, channel, bytes(data)))
        while rest:
            rest = rest[os.write(self.fd, rest) :]

    def close(self) -> None:
        os.close(self.fd)


class Repl:
    """One namespace and the cells that run in it."""

    def __init__(self, link: _AgentLink, streams: StandardStreams, line: Optional[ForkLine] = None) -> None:
        self._link = link
        self._line = line
        self._streams = streams
        self._gate = InterruptGate()
        self._compiler = Compiler()
        self._awaiter = Awaiter()
        self._sources = tracebacks.CellSources()
        self._main = namespace.make_main()
        self._tools = ToolCalls(link, self._gate, self._send)
        self._variables = Operations(link, self._gate, self._main.__dict__, self._sources)
        self._pid = os.getpid()
        self._channel: Optional[int] = None
        self._last_words: List[Message] = []
        """Messages that go out together with the cell's Exit."""
        # Other threads may display while the main thread ends the cell.
        self._send_lock = _thread.allocate_lock()
        builtins.display = self.display  # type: ignore[attr-defined]  # the builtin that this adds

    def serve(self) -> None:
        """Run cells until the agent is gone."""
        os.register_at_fork(after_in_child=self._leave_to_child)
        self._link.send(0, Ready(protocol=PROTOCOL, python=platform.python_version()))
        while True:
            if self._line is not None and self._link.empty:
                self._line.wait(self._link.fd, self._branch, self._depart)
            frame = self._link.next_frame()
            if frame is None:
                return
            # An Interrupt or values that are read here came too late: their cell or operation is over.
            message = from_host(frame.payload) if frame.kind == frames.MESSAGE else None
            if isinstance(message, Exec):
                self._serve_cell(frame.channel, message)
            elif isinstance(message, ORDERS):
                self._serve_variables(frame.channel, message)
            elif isinstance(message, ForkComes):
                self._streams.flush()
                self._variables.fork_comes()
                self._link.send(frame.channel, Exit())
            elif isinstance(message, Settle):
                os.environ.update(message.environment)
                if message.reseed:
                    randomness.reseed()
                self._link.send(frame.channel, Exit())

    def _serve_cell(self, channel: int, cell: Exec) -> None:
        self._channel = channel
        self._last_words = []
        try:
            code, reason = self._run(cell)
        except KeyboardInterrupt:
            code, reason = EXIT_INTERRUPTED, INTERRUPTED
        self._disarm()
        if os.getpid() != self._pid:
            # A child that user code forked reached the end of the cell: it must not speak for the REPL.
            os._exit(code)
        # Where no interrupt can cut it short, so that no tool stays behind.
        self._tools.end()
        with self._send_lock:
            self._channel = None
            self._link.send(channel, *self._last_words, Exit(code=code, reason=reason))

    def _serve_variables(self, channel: int, order: VariablesOrder) -> None:
        """An operation on variables ends as a cell does; it displays nothing."""
        reason = ENDED
        try:
            self._variables.run(channel, order)
        except KeyboardInterrupt:
            reason = INTERRUPTED
        self._disarm()
        self._streams.flush()
        if os.getpid() != self._pid:
            os._exit(0)
        self._link.send(channel, Exit(code=EXIT_INTERRUPTED if reason == INTERRUPTED else 0, reason=reason))

    def _run(self, cell: Exec) -> Tuple[int, str]:
        """Exit code and reason.  Raises: KeyboardInterrupt if one comes while the end is being reported."""
        code, reason = 0, ENDED
        try:
            self._gate.arm()
            self._streams.restore()
            if self._link.has_more():
                raise KeyboardInterrupt  # the host interrupted this cell before it began
            self._execute(cell)
        except SystemExit as exc:
            code = self._exit_status(exc)
        except BaseException as exc:  # noqa: BLE001  # every exception of user code ends here
            # Not isinstance: that asks the object, which may have an answer of its own.
            interrupted = issubclass(type(exc), KeyboardInterrupt)
            code, reason = (EXIT_INTERRUPTED, INTERRUPTED) if interrupted else (1, ENDED)
            self._report(exc)
        self._show_figures()
        self._streams.flush()
        self._streams.restore()
        self._streams.flush()
        return code, reason

    def _execute(self, cell: Exec) -> None:
        self._variables.bases.before_change(self._main.__dict__)
        self._sources.add(cell.name, cell.code)
        self._tools.begin(cell.tools, self._main.__dict__)
        compiled = self._compiler.compile(cell.code, cell.name)
        # The module, not its dict, is kept: user code may put another `__main__` in its place.
        value = compiled.run(self._main.__dict__, self._awaiter)
        if value is not NO_VALUE:
            self._last_words.append(Result(data=display.mime_bundle(value, self._note), kind="value"))

    def display(self, *values: Any) -> None:
        """Show each value in its richest form.  Outside of a cell, or in a forked process, print it."""
        for value in values:
            bundle = display.mime_bundle(value, self._note)
            if not self._send(Result(data=bundle, kind="display")):
                print(bundle.get("text/plain", ""))

    def _send(self, message: Message) -> bool:
        """Send within the running cell; False if there is none, or if this is a process that user code forked."""
        if os.getpid() != self._pid:
            return False
        shielded = self._gate.shield()
        try:
            with self._send_lock:
                if self._channel is None:
                    return False
                self._link.send(self._channel, message)
                return True
        finally:
            self._gate.unshield(shielded)

    def _show_figures(self) -> None:
        if "matplotlib.pyplot" in sys.modules:
            for bundle in display.take_open_figures(self._note):
                self._last_words.append(Result(data=bundle, kind="display"))

    def _report(self, exc: BaseException) -> None:
        """Traceback to stderr and the Error message."""
        sys.last_type, sys.last_value = type(exc), exc
        sys.last_traceback = tracebacks.user_traceback(exc, self._sources.names)
        name, value, text = tracebacks.describe(exc, self._sources.names)
        self._streams.flush()
        self._streams.restore()
        self._streams.write_error(text)
        self._last_words.append(Error(name=name, value=value, traceback=text))

    def _note(self, text: str) -> None:
        self._streams.write_error(f"podflare: {text}\n")

    def _exit_status(self, exc: SystemExit) -> int:
        try:
            return exit_status(exc)
        except KeyboardInterrupt:
            raise
        except BaseException as failure:  # noqa: BLE001  # for example sys.exit(object whose __str__ raises)
            self._note(f"exit message could not be written: {type(failure).__name__}")
            return 1

    def _disarm(self) -> None:
        while True:
            try:
                self._gate.disarm()
                return
            except KeyboardInterrupt:
                continue

    def _leave_to_child(self) -> None:
        """In a child that user code forked: the agent's ear belongs to the parent alone."""
        if self._line is not None and self._line.forking:
            return
        try:
            self._link.close()
            if self._line is not None:
                self._line.close()
        except OSError:
            pass

    # -- fork

    def _branch(self, children: List[ChildFds], reseed: bool, timeout_s: float) -> None:
        """Obey a fork order.  Returns in the parent and, as the REPL of another machine, in every child."""
        line = self._line
        assert line is not None
        self._streams.flush()
        self._variables.fork_comes()
        newborn, why = Newborn(reseed), ""
        line.forking = True
        try:
            mine = fork_children(children, timeout_s)
        except OSError as exc:
            mine, why = None, str(exc)
        finally:
            line.forking = False
        if mine is not None:
            self._begin_life(newborn, mine, children)
            return
        newborn.forget()
        for child in children:
            child.close()
        line.answer(not why, why)

    def _begin_life(self, newborn: Newborn, mine: ChildFds, siblings: List[ChildFds]) -> None:
        """In a child: leave the parent's machine for an own one, then wait for cells there."""
        assert self._line is not None
        os.setsid()
        own = {self._link.fd, self._line.fd, *self._streams.descriptors}
        passed = {fd for child in siblings for fd in child.all()}
        try:
            losses = newborn.look(own | passed)
            newborn.enter(mine)
        except BaseException as exc:  # noqa: BLE001  # the daemon tells it; this process has nowhere to go
            os.write(mine.line, json.dumps({"died": f"{type(exc).__name__}: {exc}"}).encode())
            os._exit(1)
        self._move_in(mine.control, mine.line, mine.stdout, mine.stderr)
        for child in siblings:
            child.close()
        self._settle(newborn, losses)
        os.write(self._link.fd, HELLO)
        self._link.send(0, Ready(protocol=PROTOCOL, python=platform.python_version()))

    def _depart(self, carrier: int, reseed: bool, timeout_s: float) -> None:
        """Obey a carry order.  Returns in the parent and, as the REPL of another machine, in the copy."""
        line = self._line
        assert line is not None
        self._streams.flush()
        self._variables.fork_comes()
        newborn, why, copied = Newborn(reseed), "", False
        line.forking = True
        try:
            copied = fork_aside(timeout_s)
        except OSError as exc:
            why = str(exc)
        finally:
            line.forking = False
        if copied:
            self._begin_elsewhere(newborn, carrier)
            return
        newborn.forget()
        os.close(carrier)
        line.answer(not why, why)

    def _begin_elsewhere(self, newborn: Newborn, carrier: int) -> None:
        """In the copy: be carried into another machine, then wait for cells there."""
        assert self._line is not None
        try:
            losses = newborn.look({self._link.fd, self._line.fd, carrier, *self._streams.descriptors})
            mine = passage.leave(carrier)
        except BaseException as exc:  # noqa: BLE001  # the carrier tells the daemon; this process has nowhere to go
            passage.tell_failure(carrier, exc)
            os._exit(1)
        try:
            os.close(carrier)
            self._move_in(mine["control"], mine["line"], mine["stdout"], mine["stderr"])
            for fd in mine.values():
                os.close(fd)
            self._settle(newborn, losses)
        except BaseException as exc:  # noqa: BLE001  # as in _begin_life
            self._line.say({"died": f"{type(exc).__name__}: {exc}"})
            os._exit(1)
        self._link.send(0, Ready(protocol=PROTOCOL, python=platform.python_version()))

    def _move_in(self, control: int, line: int, stdout: int, stderr: int) -> None:
        """Speak with another agent and daemon from now on."""
        assert self._line is not None
        os.dup2(control, self._link.fd, inheritable=False)
        os.dup2(line, self._line.fd, inheritable=False)
        self._streams.move_to(stdout, stderr)

    def _settle(self, newborn: Newborn, losses: Dict[str, object]) -> None:
        """Report, wait for the daemon's go, make this process independent of its parent."""
        assert self._line is not None
        self._pid = os.getpid()
        self._line.say({"born": losses})
        if os.read(self._line.fd, 16) != b"go":
            os._exit(1)
        for note in newborn.settle():
            self._note(f"fork: {note}")
        self._awaiter.after_fork()
