"""Operations on variables that the host orders, between two cells: survey, recall, remember, export, import.

Knows the channel to the agent by `Channel` alone.  Objects' own code runs here, so an operation can be interrupted
wherever a cell can be; what it says goes out whole all the same.
"""

from __future__ import annotations

import _thread
import os
import time
from functools import partial
from typing import Any, Callable, Dict, Mapping, Optional, Protocol

from podflare.guest.interrupts import InterruptGate
from podflare.guest.variables import parcel
from podflare.guest.variables.bases import Bases, told
from podflare.guest.variables.definitions import Namespace
from podflare.guest.variables.fingerprint import Reader, clip, read_variable
from podflare.wire import frames
from podflare.wire.messages import (
    Ack,
    Cancel,
    DataEnd,
    GuestMessage,
    HostMessage,
    Interrupt,
    from_host,
    to_payload,
)
from podflare.wire.variables import (
    BAD_VALUE,
    MAX_TABLE_BYTES,
    NO_BASE,
    TOO_LARGE,
    Variable,
    VariablesCommit,
    VariablesExport,
    VariablesFailed,
    VariablesOrder,
    VariablesParcel,
    VariablesRecall,
    VariablesRemember,
    VariablesStaged,
    VariablesSurvey,
    VariablesTable,
)

TOKEN_BYTES = 8


class Channel(Protocol):
    """The REPL's channel to its agent."""

    def next_frame(self) -> Optional[frames.Frame]: ...

    def has_more(self) -> bool: ...

    def send(self, channel: int, *messages: Any) -> None: ...

    def send_data(self, channel: int, data: memoryview) -> None: ...


class Operations:
    """The variables of one REPL."""

    def __init__(self, link: Channel, gate: InterruptGate, variables: Dict[str, Any], sources: "Sources") -> None:
        self._link = link
        self._gate = gate
        self._variables = variables
        self._sources = sources
        self._channel = 0
        self.bases = Bases()

    def fork_comes(self) -> None:
        """The REPL forks now: parent and children have this moment in common."""
        self.bases.begin(os.urandom(TOKEN_BYTES).hex())
        if _thread._count():
            # Threads go on in the parent alone and may change variables between its cells.
            self.bases.before_change(self._variables)

    def run(self, channel: int, order: VariablesOrder) -> None:
        """Carry the order out and answer it.  The Exit is the caller's.  Raises: KeyboardInterrupt if interrupted."""
        self._channel = channel
        self._gate.arm()
        try:
            self._run(order)
        except KeyboardInterrupt:
            raise
        except parcel.Misfit as exc:
            self._say(VariablesFailed(BAD_VALUE, clip(str(exc)), exc.name))
        except parcel.Overflow as exc:
            self._say(VariablesFailed(TOO_LARGE, "more bytes than one transfer may have", str(exc)))
        except parcel.Cancelled:
            pass
        except BaseException as exc:  # noqa: BLE001  # finalizers and hooks of the user's may raise anything
            self._say(VariablesFailed(BAD_VALUE, clip(type(exc).__name__)))

    def _run(self, order: VariablesOrder) -> None:
        if isinstance(order, VariablesSurvey):
            self._say(self._survey(order.budget_ms))
        elif isinstance(order, VariablesRecall):
            found = self.bases.recall(order.base, self._variables)
            self._say(found or VariablesFailed(NO_BASE, "that base is not remembered"))
        elif isinstance(order, VariablesRemember):
            self.bases.remember(order.base, order.fingerprints, order.since, order.unsettled)
        elif isinstance(order, VariablesExport):
            self._export(order)
        else:
            self._import()

    def _survey(self, budget_ms: int) -> VariablesTable:
        values, left_out = told(self._variables)
        reader = Reader(time.monotonic() + budget_ms / 1000)
        variables = {name: self._read(reader, value) for name, value in values.items()}
        self.bases.surveyed(variables, values, left_out == 0)
        known, present = self.bases.tokens()
        table = VariablesTable(variables, known, present, left_out)
        while len(to_payload(table)) > MAX_TABLE_BYTES:
            fewer = dict(list(table.variables.items())[: len(table.variables) * 3 // 4])
            table = VariablesTable(fewer, known, present, left_out + len(variables) - len(fewer))
        return table

    def _read(self, reader: Reader, value: Any) -> Variable:
        try:
            return read_variable(reader, value)
        except KeyboardInterrupt:
            if self._link.has_more():
                raise  # the host's
            return Variable("?", unread="reading it failed: KeyboardInterrupt")

    # -- export

    def _export(self, order: VariablesExport) -> None:
        values = {name: self._variables[name] for name in order.names if name in self._variables}
        home = Namespace(self._variables, self._sources.names)
        refused = {name: "there is no such variable" for name in order.names if name not in values}
        refused.update(parcel.refusals(values, home, order.limit_bytes))
        for name in refused:
            values.pop(name, None)
        self._say(VariablesParcel(tuple(values), refused))
        left = order.limit_bytes

        def write(data: memoryview) -> None:
            nonlocal left
            left -= data.nbytes
            if left < 0:
                raise parcel.Overflow
            for start in range(0, data.nbytes, frames.MAX_DATA_BYTES):
                piece = data[start : start + frames.MAX_DATA_BYTES]
                self._send(partial(self._link.send_data, self._channel, piece))

        parcel.pack(values, home, write)

    # -- import

    def _import(self) -> None:
        source = _Incoming(self._next, self._say)
        home = Namespace(self._variables, self._sources.names)
        values = parcel.unpack(source, home, self._sources.add)
        source.finish()
        self._say(VariablesStaged())
        message = self._message()
        if isinstance(message, VariablesCommit):
            # From here on nothing may cut it short, and no code of the user's runs before all is bound.
            shielded = self._gate.shield()
            try:
                self._commit(values, message)
            finally:
                self._gate.unshield(shielded)

    def _commit(self, values: Mapping[str, Any], commit: VariablesCommit) -> None:
        self.bases.before_change(self._variables)
        replaced = [self._variables.get(name) for name in (*values, *commit.drop)]
        self._variables.update(values)
        for name in commit.drop:
            self._variables.pop(name, None)
        self.bases.remember(commit.base, commit.fingerprints, commit.since, commit.unsettled)
        del replaced  # their finalizers run now

    def _next(self) -> frames.Frame:
        """The next frame of this operation.  Raises: KeyboardInterrupt; Cancelled; EOFError if the agent is gone."""
        shielded = self._gate.shield()
        try:
            frame = self._link.next_frame()
        finally:
            self._gate.unshield(shielded)
        if frame is None:
            raise EOFError("the agent is gone")
        if frame.kind == frames.MESSAGE:
            message = from_host(frame.payload)
            if isinstance(message, Interrupt):
                raise KeyboardInterrupt
            if isinstance(message, Cancel):
                raise parcel.Cancelled
        return frame

    def _message(self) -> HostMessage:
        while True:
            frame = self._next()
            if frame.kind == frames.MESSAGE:
                return from_host(frame.payload)

    # -- to the host

    def _say(self, message: GuestMessage) -> None:
        self._send(lambda: self._link.send(self._channel, message))

    def _send(self, send: Callable[[], None]) -> None:
        """A frame goes out whole."""
        shielded = self._gate.shield()
        try:
            send()
        finally:
            self._gate.unshield(shielded)


class Sources(Protocol):
    """Sources of cells, for tracebacks."""

    names: "set[str]"

    def add(self, name: str, source: str) -> None: ...


class _Incoming:
    """A file of the bytes that the host sends."""

    def __init__(self, next_frame: Callable[[], frames.Frame], say: Callable[[GuestMessage], None]) -> None:
        self._next = next_frame
        self._say = say
        self._piece = memoryview(b"")
        self._ended = False

    def _more(self) -> bool:
        """Have a piece that is not empty; False at the end."""
        while not self._piece and not self._ended:
            frame = self._next()
            if frame.kind == frames.DATA:
                self._piece = memoryview(frame.payload)
                self._say(Ack(len(frame.payload)))
            elif isinstance(from_host(frame.payload), DataEnd):
                self._ended = True
        return bool(self._piece)

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        done = 0
        while done < target.nbytes and self._more():
            piece = self._piece[: target.nbytes - done]
            target[done : done + len(piece)] = piece
            self._piece = self._piece[len(piece) :]
            done += len(piece)
        return done

    def read(self, size: int) -> bytes:
        buffer = bytearray(size)
        return bytes(memoryview(buffer)[: self.readinto(buffer)])

    def readline(self) -> bytes:
        line = bytearray()
        while not line.endswith(b"\n") and self._more():
            line += self._piece[:1]
            self._piece = self._piece[1:]
        return bytes(line)

    def finish(self) -> None:
        """Read to the end."""
        while self._more():
            self._piece = memoryview(b"")
