"""Operations on the variables of sandboxes' REPLs: what there is, what it was at a base, values from one to another.

Every operation needs a turn in the queue of each sandbox that it names: while it runs no cell may.  What a guest says
is hostile; values are opaque bytes here, and are never looked into.  An operation that takes too long ends as a cell
does: interrupt, kill, the machine's end.  Knows no HTTP and no files.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Protocol

import anyio

from podflare.errors import Conflict, DeadlineExceeded, MachineFailed, PodflareError, ProtocolError, TooLarge
from podflare.host.config import Config
from podflare.host.guest_link import GuestLink
from podflare.wire import frames
from podflare.wire.messages import (
    DIED,
    ENDED,
    WINDOW_BYTES,
    Ack,
    Cancel,
    DataEnd,
    Exit,
    GuestMessage,
    HostMessage,
    Interrupt,
    Kill,
    from_guest,
)
from podflare.wire.variables import (
    MAX_NAME_CHARS,
    TOO_LARGE,
    VariablesBase,
    VariablesCommit,
    VariablesExport,
    VariablesFailed,
    VariablesImport,
    VariablesParcel,
    VariablesRecall,
    VariablesRemember,
    VariablesStaged,
    VariablesSurvey,
    VariablesTable,
    check_size,
)

MAX_PARCEL_BYTES = 256 * 1024 * 1024
"""Of all values that one transfer carries."""
_HOLD_BYTES = 1024 * 1024
"""Received bytes that nobody took yet, from which on the guest is held up."""
_READING_SHARE = 0.8
"""Of the time that a survey has, so much goes to reading; the rest is for what comes back."""


class Holder(Protocol):
    """What an operation needs of a sandbox."""

    id: str
    config: Config

    @property
    def link(self) -> GuestLink: ...

    def give_up(self, cause: str) -> None:
        """The guest ignores the host: close the machine."""


class Unimportable(Conflict):
    """A value could not be rebuilt in the receiving REPL; nothing was bound there."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name
        """The variable; empty if it is not known."""


class _Operation:
    """One order to a REPL, what comes back, and its end, whatever happens."""

    def __init__(self, holder: Holder, order: HostMessage, timeout_s: float) -> None:
        self._holder = holder
        self._link = holder.link
        self._order = order
        self._timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        self._inbox: deque[GuestMessage | bytes] = deque()
        self._inbox_bytes = 0
        self._held = False
        self._leaving = False
        self._changed = asyncio.Event()
        self._exit: Exit | None = None
        self._down = ""
        self._channel = 0
        self._sent = self._acknowledged = 0

    async def __aenter__(self) -> _Operation:
        self._channel = self._link.attach(self)
        try:
            self._link.say(self._channel, self._order)
        except BaseException:
            self._link.detach(self._channel)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave no trace in the REPL's queue.  Raises: DeadlineExceeded with the loss if it had to be killed."""
        killed = False
        try:
            if self._exit is None and not self._down:
                with anyio.CancelScope(shield=True):
                    killed = await self._stop()
        finally:
            self._release()
            self._link.detach(self._channel)
        if killed and (exc is None or isinstance(exc, Exception)):
            raise DeadlineExceeded(
                f"the Python process of {self._holder.id} did not leave its variables alone when interrupted and was "
                "killed: they are lost"
            ) from exc

    async def _stop(self) -> bool:
        """Interrupt, kill, give the machine up: until the REPL is free.  Returns whether it had to be killed."""
        self._leaving = True
        self._inbox.clear()
        self._release()
        self._link.say(self._channel, Interrupt())
        if await self._ends_within(self._holder.config.interrupt_grace_s):
            return False
        self._link.say(self._channel, Kill())
        if not await self._ends_within(self._holder.config.kill_grace_s):
            self._holder.give_up("its guest did not end an operation on variables although it was told to kill it")
        return True

    async def _ends_within(self, seconds: float) -> bool:
        with anyio.move_on_after(seconds):
            while self._exit is None and not self._down:
                self._changed.clear()
                await self._changed.wait()
        return self._exit is not None or bool(self._down)

    def _release(self) -> None:
        if self._held:
            self._held = False
            self._link.unhold()

    # What the guest says.

    def on_frame(self, frame: frames.Frame) -> None:
        if frame.kind == frames.DATA:
            if not self._leaving:
                self._inbox.append(frame.payload)
                self._inbox_bytes += len(frame.payload)
                if self._inbox_bytes >= _HOLD_BYTES and not self._held:
                    self._held = True
                    self._link.hold()
        elif frame.kind != frames.MESSAGE:
            raise ProtocolError(f"frame of kind {frame.kind} within an operation on variables")
        else:
            check_size(frame.payload)
            self._on_message(from_guest(frame.payload))
        self._changed.set()

    def _on_message(self, message: GuestMessage) -> None:
        if isinstance(message, Exit):
            self._exit = message
            self._link.detach(self._channel)
        elif isinstance(message, Ack):
            self._acknowledged += message.bytes
            if self._acknowledged > self._sent:
                raise ProtocolError("more bytes acknowledged than sent")
        elif not isinstance(
            message, (VariablesTable, VariablesBase, VariablesParcel, VariablesStaged, VariablesFailed)
        ):
            raise ProtocolError(f"message {message.op!r} within an operation on variables")
        elif not self._leaving:
            if len(self._inbox) > _HOLD_BYTES // frames.HEADER.size:
                raise ProtocolError("too many messages within an operation on variables")
            self._inbox.append(message)

    def on_down(self, cause: str) -> None:
        self._down = cause
        self._changed.set()

    # For the operation.

    async def _wait(self, condition: Callable[[], bool]) -> None:
        """Raises: DeadlineExceeded; MachineFailed, Conflict if the guest or its REPL is gone before `condition`."""
        try:
            with anyio.fail_after(max(0.0, self._deadline_s - time.monotonic())):
                while not condition():
                    if self._down:
                        raise MachineFailed(f"the variables of {self._holder.id} cannot be had: {self._down}")
                    if self._exit is not None:
                        raise self._ended()
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise DeadlineExceeded(
                f"the variables of {self._holder.id} were not read or set within {self._timeout_s:g} s: nothing was "
                "changed"
            ) from None

    def _ended(self) -> PodflareError:
        assert self._exit is not None
        if self._exit.reason == DIED:
            return Conflict(
                f"the Python process of {self._holder.id} died while its variables were read or set: they are lost"
            )
        return Conflict(f"reading or setting the variables of {self._holder.id} was ended from within; nothing changed")

    async def next(self) -> GuestMessage | bytes:
        """What came next: a message, or bytes of a parcel.

        Raises: as _wait; TooLarge, Unimportable, Conflict for VariablesFailed.
        """
        await self._wait(lambda: bool(self._inbox))
        item = self._inbox.popleft()
        if isinstance(item, bytes):
            self._inbox_bytes -= len(item)
            if self._inbox_bytes < _HOLD_BYTES // 2:
                self._release()
        elif isinstance(item, VariablesFailed):
            raise self._failure(item)
        return item

    def _failure(self, failed: VariablesFailed) -> PodflareError:
        what = f"variable {failed.name[:MAX_NAME_CHARS]!r} of" if failed.name else "variables of"
        text = f"{what} {self._holder.id}: {failed.message}"
        if failed.reason == TOO_LARGE:
            return TooLarge(text)
        return Unimportable(text, failed.name)

    async def drained(self) -> bool:
        """Whether the operation has ended well and nothing more comes.  Raises: as `next`."""
        await self._wait(lambda: bool(self._inbox) or self._exit is not None)
        if self._inbox:
            return False
        if self._exit is None or self._exit.reason != ENDED:
            raise self._ended()
        return True

    async def send(self, data: bytes) -> None:
        """Pass bytes on.  Raises: as `next`."""
        for start in range(0, len(data), frames.MAX_DATA_BYTES):
            piece = memoryview(data)[start : start + frames.MAX_DATA_BYTES]
            await self._wait(partial(self._may_send, len(piece)))
            if self._inbox:
                await self.next()
                raise self.violation("an answer before the end of the values")
            self._link.send_bytes(frames.DATA, self._channel, piece)
            self._sent += len(piece)

    def _may_send(self, size: int) -> bool:
        return bool(self._inbox) or self._sent - self._acknowledged + size <= WINDOW_BYTES

    def say(self, message: HostMessage) -> None:
        """Another message of this operation."""
        self._link.say(self._channel, message)

    async def done(self) -> None:
        """Wait for the end.  Raises: as `next`, if it is not the good one."""
        if not await self.drained():
            await self.next()
            raise self.violation("an answer that nobody asked for")

    def violation(self, what: str) -> PodflareError:
        """The error for it, ready to raise; the machine is closed."""
        self._holder.give_up(f"the guest broke the protocol: {what}")
        return MachineFailed(f"{self._holder.id}: the guest broke the protocol: {what}")

    async def expect(self, kind: type[GuestMessage]) -> GuestMessage:
        """The next message, which must be of `kind`.  Raises: as `next`; MachineFailed if it is another one."""
        message = await self.next()
        if not isinstance(message, kind):
            raise self.violation(f"no {kind.__name__}")
        return message


async def table_of(holder: Holder, *, timeout_s: float) -> VariablesTable:
    """All variables of one sandbox.

    Raises: DeadlineExceeded if objects' own code takes too long; Conflict if the REPL ended; MachineFailed.
    If cancelled: nothing has changed.
    """
    budget_ms = int(timeout_s * _READING_SHARE * 1000)
    async with _Operation(holder, VariablesSurvey(budget_ms), timeout_s) as operation:
        table = await operation.expect(VariablesTable)
        await operation.done()
    assert isinstance(table, VariablesTable)
    return table


async def recall(holder: Holder, base: str, *, timeout_s: float) -> VariablesBase:
    """What the sandbox remembers of one of its table's `bases`.  Raises: as table_of."""
    async with _Operation(holder, VariablesRecall(base), timeout_s) as operation:
        found = await operation.expect(VariablesBase)
        await operation.done()
    assert isinstance(found, VariablesBase)
    return found


async def remember(holder: Holder, base: VariablesRemember, *, timeout_s: float) -> None:
    """Give the sandbox a base.  Raises: as table_of."""
    async with _Operation(holder, base, timeout_s) as operation:
        await operation.done()


class Staged:
    """Values that have arrived in a REPL and are not bound yet."""

    def __init__(self, parcel: VariablesParcel, operation: _Operation) -> None:
        self.names = parcel.names
        """What arrived."""
        self.refused = parcel.refused
        """Name -> why its value cannot travel."""
        self._operation = operation
        self.committed = False

    async def commit(self, *, drop: tuple[str, ...], base: VariablesRemember) -> None:
        """Bind all that arrived, unbind `drop`, and remember the base, in one step that user code cannot hinder.

        Raises: as table_of; what was replaced may then be lost with the REPL.
        """
        self._operation.say(VariablesCommit(drop, base.base, base.fingerprints, base.since, base.unsettled))
        await self._operation.done()
        self.committed = True


@asynccontextmanager
async def staged(
    source: Holder, target: Holder, names: tuple[str, ...], *, timeout_s: float, limit_bytes: int = MAX_PARCEL_BYTES
) -> AsyncIterator[Staged]:
    """Within the block the values of `names` have come from one REPL into the other; `commit` binds them there.

    Values are one pickle, so objects that several of them share stay shared.  Functions and classes that cells defined
    travel with their code.  A block that is left without `commit` leaves nothing.

    Raises: Unimportable if a value cannot be rebuilt there; TooLarge above limit_bytes; as table_of.
    """
    async with (
        _Operation(source, VariablesExport(names, limit_bytes), timeout_s) as export,
        _Operation(target, VariablesImport(), timeout_s) as load,
    ):
        parcel = await export.expect(VariablesParcel)
        assert isinstance(parcel, VariablesParcel)
        await _pump(export, load, limit_bytes)
        await load.expect(VariablesStaged)
        result = Staged(parcel, load)
        yield result
        if not result.committed:
            load.say(Cancel())
            await load.done()


async def _pump(export: _Operation, load: _Operation, limit_bytes: int) -> None:
    total = 0
    while not await export.drained():
        data = await export.next()
        if not isinstance(data, bytes):
            raise export.violation("a message amid values")
        total += len(data)
        if total > limit_bytes:
            raise TooLarge(f"the variables are more than {limit_bytes} bytes")
        await load.send(data)
    load.say(DataEnd())
