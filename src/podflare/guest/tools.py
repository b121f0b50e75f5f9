"""Tools: what the code of a cell sees as coroutine functions, and how their calls wait for answers.

Knows the REPL's channel only by `send` and `Inbox`.  A call belongs to the event loop that awaits it, which may run in
any thread; whichever loop finds answers on the channel hands them to the loops that wait.
"""

from __future__ import annotations

import _thread
import builtins
import os
import select
from collections import deque
from typing import Any, Callable, Deque, Dict, Optional, Protocol, Tuple, Type

from podflare.guest.interrupts import InterruptGate
from podflare.wire import frames
from podflare.wire.messages import Message, ToolCall, ToolCancel, ToolResult, from_host
from podflare.wire.tools import MAX_INPUT_BYTES, MAX_PENDING_CALLS, Tools, check_json, is_name

_MISSING = object()


class Inbox(Protocol):
    """What the agent sends."""

    fd: int

    @property
    def empty(self) -> bool: ...

    def next_frame(self) -> Optional[frames.Frame]: ...


class ToolCalls:
    """The tools of the running cell and their calls."""

    def __init__(self, inbox: Inbox, gate: InterruptGate, send: Callable[[Message], bool]) -> None:
        """`send` gives False if the message is not from the running cell."""
        self._inbox = inbox
        self._gate = gate
        self._send = send
        self._pid = 0
        self._open = False
        self._cell = 0
        """Counts `begin`: a function that outlives its cell knows that it did."""
        self._replaced: Dict[str, Any] = {}
        self._functions: Dict[str, Any] = {}
        self._namespace: Dict[str, Any] = {}
        self._calls = 0
        self._pending: Dict[int, Tuple[Any, Any]] = {}
        """Call -> loop and future."""
        self._waiting: Deque[Tuple[Any, Any]] = deque()
        """Calls above MAX_PENDING_CALLS."""
        self._watching: Dict[Any, int] = {}
        """Calls of each loop."""
        self._reading = _thread.allocate_lock()
        # Not the inbox's own, which is for the main thread.
        self._poll = select.poll()
        self._poll.register(inbox.fd, select.POLLIN)

    # The cell's life.

    def begin(self, tools: Tools, namespace: Dict[str, Any]) -> None:
        """Put the functions into the namespace."""
        if not tools:
            return
        self._pid = os.getpid()
        self._cell += 1
        self._namespace = namespace
        self._functions = {name: self._function(name, parameters) for name, parameters in tools.items()}
        self._replaced = {name: namespace.get(name, _MISSING) for name in tools}
        # An interrupt may come at any line: from here on `end` finds everything that it needs.
        self._open = True
        namespace.update(self._functions)

    def end(self) -> None:
        """Give back what the functions replaced, unless the code gave the name to something else; cancel what waits."""
        if not self._open:
            return
        with self._reading:
            self._open = False
        for name, function in self._functions.items():
            if self._namespace.get(name) is not function:
                continue
            if self._replaced[name] is _MISSING:
                del self._namespace[name]
            else:
                self._namespace[name] = self._replaced[name]
        self._functions, self._replaced, self._namespace = {}, {}, {}
        abandoned = [*self._pending.values(), *self._waiting]
        self._pending.clear()
        self._waiting.clear()
        for loop, future in abandoned:
            _from_any_thread(loop, future.cancel)
        watching = list(self._watching)
        self._watching.clear()
        for loop in watching:
            # The loop of the cells rests now, and a fork may come before it runs again.
            if loop.is_running():
                _from_any_thread(loop, self._unregister, loop)
            else:
                self._unregister(loop)

    def _function(self, name: str, parameters: Tuple[str, ...]) -> Any:
        cell = self._cell

        async def tool(*args: Any, **kwargs: Any) -> Any:
            given = _bind(name, parameters, args, kwargs)
            check_json(given, max_bytes=MAX_INPUT_BYTES, error=ValueError, what=f"the input of {name}()")
            return await self._call(cell, name, given)

        tool.__name__ = tool.__qualname__ = name
        tool.__module__ = "__main__"
        tool.__doc__ = f"Calls {name}({', '.join(parameters)}) of the program that runs this cell; await it."
        return tool

    # One call.

    async def _call(self, cell: int, name: str, given: Dict[str, Any]) -> Any:
        import asyncio  # not before it is needed, as in cells.py

        if os.getpid() != self._pid:
            raise RuntimeError(f"{name}() can only be called by the process of the cell itself")
        loop = asyncio.get_running_loop()
        while len(self._pending) >= MAX_PENDING_CALLS and self._is_open(cell):
            place = loop.create_future()
            self._waiting.append((loop, place))
            try:
                await place
            except asyncio.CancelledError:
                self._give_place()
                raise
        over = f"{name}() cannot be called any more: the cell that it was given to is over"
        if not self._is_open(cell):
            raise RuntimeError(over)
        self._calls += 1
        number, future = self._calls, loop.create_future()
        self._pending[number] = loop, future
        self._watch(loop)
        try:
            if not self._send(ToolCall(number, name, given)):
                raise RuntimeError(over)
            answer: ToolResult = await future
        finally:
            waited = self._pending.pop(number, None) is not None
            if self._is_open(cell):
                self._unwatch(loop)
                if waited:
                    self._send(ToolCancel(number))
                self._give_place()
        if answer.error:
            raise _exception(answer)
        return answer.value

    def _is_open(self, cell: int) -> bool:
        return self._open and self._cell == cell

    def _give_place(self) -> None:
        if self._waiting and len(self._pending) < MAX_PENDING_CALLS:
            loop, place = self._waiting.popleft()
            _from_any_thread(loop, _set, place, None)

    # Answers.

    def _watch(self, loop: Any) -> None:
        self._watching[loop] = self._watching.get(loop, 0) + 1
        if self._watching[loop] == 1:
            loop.add_reader(self._inbox.fd, self._on_readable)

    def _unwatch(self, loop: Any) -> None:
        self._watching[loop] -= 1
        if not self._watching[loop]:
            del self._watching[loop]
            self._unregister(loop)

    def _unregister(self, loop: Any) -> None:
        """Unless the loop has come to wait for calls again meanwhile."""
        if loop not in self._watching and not loop.is_closed():
            loop.remove_reader(self._inbox.fd)

    def _on_readable(self) -> None:
        shielded = self._gate.shield()
        try:
            with self._reading:
                # Once the cell is over, what comes is not for us; and never in a process that user code forked.
                while self._open and os.getpid() == self._pid and (not self._inbox.empty or self._poll.poll(0)):
                    frame = self._inbox.next_frame()
                    if frame is None:
                        return  # the agent is gone, and this process is about to be
                    message = from_host(frame.payload)
                    # Else an Interrupt, which comes as a signal, too.
                    if isinstance(message, ToolResult):
                        loop, future = self._pending.pop(message.call, (None, None))
                        if loop is not None:
                            _from_any_thread(loop, _set, future, message)
        finally:
            self._gate.unshield(shielded)


def _from_any_thread(loop: Any, function: Callable[..., Any], *args: Any) -> None:
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        pass  # a loop that was closed: nobody waits there


def _set(future: Any, value: Any) -> None:
    if not future.done():
        future.set_result(value)


def _bind(name: str, parameters: Tuple[str, ...], args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """The input of a call: arguments by name, by position, or all of them in one dict.  Raises: TypeError."""
    if len(args) == 1 and not kwargs and type(args[0]) is dict and _is_input(parameters, args[0]):
        return dict(args[0])
    if len(args) > len(parameters):
        if not parameters:
            raise TypeError(f"{name}() takes its arguments by name, or in one dict")
        raise TypeError(f"{name}() takes {len(parameters)} positional arguments but {len(args)} were given")
    given = dict(zip(parameters, args))
    twice = sorted(set(given) & set(kwargs))
    if twice:
        raise TypeError(f"{name}() got multiple values for argument {twice[0]!r}")
    given.update(kwargs)
    return given


def _is_input(parameters: Tuple[str, ...], value: Dict[Any, Any]) -> bool:
    """Whether a lone dict is all arguments together, not the first one."""
    by_name = all(type(key) is str for key in value)
    return by_name and (not value or not parameters or any(key in parameters for key in value))


def _exception(answer: ToolResult) -> Exception:
    """A built-in exception where the name is that of one, else one of that name."""
    kind = getattr(builtins, answer.error, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(answer.message)
        except TypeError:
            pass  # some take more than a message
    name = answer.error if is_name(answer.error) else "ToolError"
    own: Type[Exception] = type(name, (Exception,), {"__module__": "__main__"})
    return own(answer.message)
