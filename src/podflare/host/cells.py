"""One cell: its policy of timeout, interrupt and kill, its output, its end.  Trusts nothing the guest says about time.

A cell is driven by callbacks (frames from the link, timers), so it goes on and ends whether or not a client reads;
the client's side is `next_chunk`.  Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import anyio

from podflare.errors import ProtocolError, TooLarge
from podflare.host.config import Config
from podflare.host.guest_link import GuestLink
from podflare.host.kept import KeptOutput, Room
from podflare.host.output import CappedStream, EventFeed, ReplayBuffer
from podflare.host.pace import FRAME_COST, LINE_COST, Pace
from podflare.host.tools import ToolCalls
from podflare.wire import events, frames
from podflare.wire.api import ExecRequest, ToolAnswer
from podflare.wire.messages import (
    DIED,
    INTERRUPTED,
    Error,
    Exec,
    Exit,
    Interrupt,
    Kill,
    Result,
    ToolCall,
    ToolCancel,
    ToolResult,
    from_guest,
    to_payload,
)
from podflare.wire.tools import MAX_INPUT_BYTES

SMALL_MESSAGE_BYTES = 64 * 1024
"""Messages up to this size are always decoded; larger results count against their cap first."""
MAX_CALL_BYTES = MAX_INPUT_BYTES + 4096
"""Of a message that is a tool call."""
_CALL_START = to_payload(ToolCall())[: len('{"op":"tool_call"')]
MIN_RESULT_CHARGE = 1024

# Why the host ends a cell; values of `reason` in its exit event.
STOP_INTERRUPTED = "interrupted"
STOP_TIMED_OUT = "timed_out"
STOP_DISCONNECTED = "disconnected"

_STREAMS = {frames.STDOUT: events.STDOUT, frames.STDERR: events.STDERR}


@dataclass(frozen=True)
class Ending:
    """How a cell ended, before the host's own judgement."""

    code: int
    reason: str
    restarted: bool = False
    notes: tuple[str, ...] = ()
    """Lines for stderr."""


def check_fits(request: ExecRequest) -> None:
    """Raises: TooLarge if the code is above what one frame to the guest holds."""
    # At worst each character becomes a \\uXXXX escape; only code that could be too large is encoded to see.
    if 6 * len(request.code) + 1024 > frames.MAX_MESSAGE_BYTES or request.tools:
        size = len(to_payload(Exec(request.code, request.language, tools=request.tools)))
        if size + 1024 > frames.MAX_MESSAGE_BYTES:
            raise TooLarge(f"code of {size} bytes when encoded, the cap is {frames.MAX_MESSAGE_BYTES}")


class Surroundings(Protocol):
    """What a cell needs of its sandbox."""

    id: str
    config: Config
    replay: ReplayBuffer
    pace: Pace

    def slow_down(self, cost: int) -> None:
        """Output came: stop reading for a while if it comes too fast."""

    def cell_said_exit(self, cell: Cell, message: Exit) -> None:
        """The guest ended the cell.  The sandbox answers with `cell.finish`, now or soon."""

    def give_up(self, cause: str) -> None:
        """The guest ignores the host: close the machine."""


class _Stream:
    """One of a cell's two output streams."""

    def __init__(self, config: Config, kept: KeptOutput) -> None:
        self.cap = CappedStream(config.stream_head_bytes, config.stream_tail_bytes)
        self.kept = kept
        self.passed = 0
        self.dropped = 0


class Cell:
    """One code execution.  Owned by its sandbox: made waiting, then `start`, `finish`, and at the very end `forget`."""

    def __init__(
        self, number: int, cell_id: str, request: ExecRequest, sandbox: Surroundings, directory: Path, room: Room
    ) -> None:
        self.id = cell_id
        self.number = number
        self.request = request
        self.over = False
        self.started_at_s: float | None = None
        self.stopping = ""
        """Why the host asked the guest to end the cell; empty if it did not."""
        self.killed = False
        self._sandbox = sandbox
        self._config = sandbox.config
        self._link: GuestLink | None = None
        self._held: GuestLink | None = None
        self._channel = 0
        self._feed = EventFeed(self._record)
        cell_room = Room(self._config.keep_cell_bytes)
        self._streams = {
            name: _Stream(self._config, KeptOutput(directory, (cell_room, room), self._hold))
            for name in (events.STDOUT, events.STDERR)
        }
        self._result_left = self._config.max_result_bytes
        self._results_dropped = 0
        self._calls = ToolCalls(
            cell_id,
            request.tools,
            request.tool_timeout_seconds,
            emit=self._tell_of_call,
            reply=self._reply_to_call,
            changed=self._set_waiting,
        )
        self._time_left_s = request.timeout_seconds
        self._clock_from_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._beat_timer: asyncio.TimerHandle | None = None
        self._beat_due = False
        self._taken_at_s = 0.0
        self._awake = asyncio.Event()
        self._reader = True

    # Running.

    def start(self, link: GuestLink, *, name: str) -> None:
        """Send the cell to the guest.  Raises: TooLarge, MachineFailed; then it did not start."""
        self._channel = link.attach(self)
        try:
            message = Exec(self.request.code, self.request.language, name=name, tools=self.request.tools)
            link.say(self._channel, message)
        except BaseException:
            link.detach(self._channel)
            raise
        self._link = link
        self.started_at_s = time.monotonic()
        self._set_waiting(False)

    def tell(self, line: str) -> None:
        """A line of the host's own, on stderr."""
        self._feed.put(events.STDERR, line, _now_ms())
        self._awake.set()

    def warn(self, data: dict[str, object]) -> None:
        """A warning event: what `wire.events.WARNING` holds."""
        if self._reader:
            self._feed.put(events.WARNING, data, _now_ms())
            self._awake.set()

    @property
    def duration_s(self) -> float:
        return 0.0 if self.started_at_s is None else time.monotonic() - self.started_at_s

    def stop(self, why: str) -> None:
        """Interrupt the running cell; kill it if it does not end; close the machine if even that does nothing.

        The first reason stands.  Idempotent.
        """
        if self.over or self.stopping or self._link is None:
            return
        self.stopping = why
        self._link.say(self._channel, Interrupt())
        self._after(self._config.interrupt_grace_s, self._kill)

    def _kill(self) -> None:
        if self._link is None:
            return
        self.killed = True
        self._link.say(self._channel, Kill())
        self._after(
            self._config.kill_grace_s,
            lambda: self._sandbox.give_up("its guest did not end a cell although it was told to kill it"),
        )

    def _after(self, delay_s: float, what: Callable[[], None]) -> None:
        self._cancel_timer()
        self._timer = asyncio.get_running_loop().call_later(delay_s, what)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # Tools.

    def answer(self, answer: ToolAnswer) -> None:
        """Pass on the answer to a tool call.  Raises: as ToolCalls.answer."""
        self._calls.answer(answer)

    def _tell_of_call(self, kind: str, data: dict[str, object]) -> None:
        if self._reader:
            self._feed.put(kind, data, _now_ms(), {"cell_id": self.id})
            self._awake.set()

    def _reply_to_call(self, message: ToolResult) -> None:
        if self._link is not None:
            self._link.say(self._channel, message)

    def _set_waiting(self, waiting: bool) -> None:
        """The cell's clock stands still while it waits for tools: their time is not its own."""
        if self._time_left_s is None or self.stopping or self._link is None:
            return
        if waiting:
            self._time_left_s -= time.monotonic() - self._clock_from_s
            self._cancel_timer()
        else:
            self._clock_from_s = time.monotonic()
            self._after(max(0.0, self._time_left_s), lambda: self.stop(STOP_TIMED_OUT))

    def _hold(self, stop: bool) -> None:
        if stop and self._link is not None:
            self._held = self._link
            self._held.hold()
        elif not stop and self._held is not None:
            # The disk may catch up only when the cell is over: the link must be let go even then.
            self._held.unhold()
            self._held = None

    # What the guest says.

    def on_frame(self, frame: frames.Frame) -> None:
        stream = _STREAMS.get(frame.kind)
        if stream is not None:
            self._on_output(stream, frame.payload)
        elif frame.kind != frames.MESSAGE:
            raise ProtocolError(f"frame of kind {frame.kind} within a cell")
        elif len(frame.payload) <= SMALL_MESSAGE_BYTES:
            self._on_message(frame.payload)
        elif frame.payload.startswith(_CALL_START):
            self._on_large_call(frame.payload)
        elif not self._admit_result(len(frame.payload)):
            self._results_dropped += 1
        else:
            self._on_message(frame.payload)

    def _on_output(self, name: str, data: bytes) -> None:
        stream = self._streams[name]
        self._sandbox.slow_down(len(data) + FRAME_COST)
        stream.kept.append(data)
        now = stream.cap.feed(data)
        stream.passed += len(now)
        if now and self._reader:
            self._feed.put_raw(name, now, _now_ms())
            self._awake.set()

    def _on_message(self, payload: bytes) -> None:
        message = from_guest(payload)
        if isinstance(message, Exit):
            assert self._link is not None
            self._link.detach(self._channel)
            self._cancel_timer()
            self._calls.close()
            self._sandbox.cell_said_exit(self, message)
        elif isinstance(message, (Result, Error)):
            if len(payload) <= SMALL_MESSAGE_BYTES and not self._admit_result(max(len(payload), MIN_RESULT_CHARGE)):
                self._results_dropped += 1
            elif self._reader:
                self._put_result(message)
        elif isinstance(message, ToolCall):
            self._calls.on_call(message)
        elif isinstance(message, ToolCancel):
            self._calls.on_cancel(message)
        else:
            raise ProtocolError(f"message {message.op!r} within a cell")

    def _on_large_call(self, payload: bytes) -> None:
        # It begins as a call does, so that it does not count as a result: then it must be one.
        if len(payload) > MAX_CALL_BYTES:
            raise ProtocolError(f"tool call of {len(payload)} bytes, the cap is {MAX_CALL_BYTES}")
        message = from_guest(payload)
        if not isinstance(message, ToolCall):
            raise ProtocolError(f"message {message.op!r} that begins as a tool call")
        self._calls.on_call(message)

    def _admit_result(self, size: int) -> bool:
        if size > self._result_left:
            return False
        self._result_left -= size
        return True

    def _put_result(self, message: Result | Error) -> None:
        if isinstance(message, Result):
            self._feed.put(events.RESULT, message.data, _now_ms(), {"kind": message.kind})
        else:
            data = {"name": message.name, "value": message.value, "traceback": message.traceback}
            self._feed.put(events.ERROR, data, _now_ms())
        self._awake.set()

    def on_down(self, cause: str) -> None:
        # The sandbox hears it too, learns why, and finishes all its cells.
        self._link = None
        self._cancel_timer()
        self._calls.close()

    # The end.

    def finish(self, ending: Ending) -> None:
        """The cell is over: flush its output, say why it ended, end its stream.  Idempotent."""
        if self.over:
            return
        self.over = True
        self._cancel_timer()
        self._calls.close()
        if self._link is not None:
            self._link.detach(self._channel)
            self._link = None
        now = _now_ms()
        for name, stream in self._streams.items():
            self._flush(name, stream, now)
        notes = list(ending.notes)
        if self._results_dropped:
            notes.insert(0, f"[podflare] {self._results_dropped} rich results were dropped: this cell's were too large")
        for note in notes:
            self._feed.put(events.STDERR, note, now)
        if not self._reader:
            # Nobody takes the output; the exit still separates this cell from the next one in the replay.
            self._feed.clear()
        self._feed.put(events.EXIT, ending.code, now, self._exit_keys(ending))
        if not self._reader:
            self._feed.take()
        self._awake.set()

    def _flush(self, name: str, stream: _Stream, now: int) -> None:
        dropped, tail = stream.cap.finish(stream.passed)
        stream.dropped = dropped
        if dropped:
            self._feed.put_line_end(name, now)
            whole = f"/v1/sandboxes/{self._sandbox.id}/cells/{self.id}/output?stream={name}"
            kept = "all of it" if not stream.kept.cut else f"its first {stream.kept.kept} bytes"
            self._feed.put(
                events.STDERR, f"[podflare] {name}: {dropped} bytes left out here; {kept} can be read at {whole}", now
            )
        if tail:
            self._feed.put_raw(name, tail, now)
        self._feed.put_line_end(name, now)

    def _exit_keys(self, ending: Ending) -> dict[str, object]:
        return {
            "cell_id": self.id,
            "duration_ms": round(self.duration_s * 1000, 3),
            "reason": ending.reason,
            "restarted": ending.restarted,
            "stdout_dropped_bytes": self._streams[events.STDOUT].dropped,
            "stderr_dropped_bytes": self._streams[events.STDERR].dropped,
        }

    def kept(self, stream: str) -> KeptOutput:
        """The whole output of one stream, as far as it was kept."""
        return self._streams[stream].kept

    def forget(self) -> None:
        """Release the kept output."""
        for stream in self._streams.values():
            stream.kept.close()

    def _record(self, seq: int, line: bytes) -> None:
        self._sandbox.replay.add(self.number, seq, line)

    # The client's side.

    def leave(self) -> None:
        """The client is gone: nothing more is taken, and a cell that still runs is stopped.  Idempotent."""
        self._reader = False
        self._cancel_beat()
        if not self.over:
            self._feed.clear()
            self.stop(STOP_DISCONNECTED)
        self._awake.set()

    async def next_chunk(self) -> tuple[bytes, bool]:
        """The next encoded lines (or a heartbeat) and whether they are the last ones.

        After the client left: (b"", True).
        """
        if self._beat_timer is None and self._config.heartbeat_s and not self.over:
            self._taken_at_s = time.monotonic()
            self._arm_beat(self._config.heartbeat_s)
        while True:
            if not self._reader:
                return b"", True
            self._awake.clear()
            chunk = self._feed.take()
            if not self._feed:
                self._calls.all_told()
            last = self.over and not self._feed
            if last:
                self._cancel_beat()
            if chunk or last:
                self._beat_due = False
                await self._keep_pace(chunk)
                self._taken_at_s = time.monotonic()
                return chunk, last
            if self._beat_due:
                self._beat_due = False
                return events.HEARTBEAT, False
            await self._awake.wait()

    async def _keep_pace(self, chunk: bytes) -> None:
        """Short lines cost the daemon far more than their bytes."""
        owed_s = self._sandbox.pace.spend(LINE_COST * chunk.count(b"\n"), time.monotonic())
        if owed_s:
            await anyio.sleep(owed_s)

    def _arm_beat(self, delay_s: float) -> None:
        self._beat_timer = asyncio.get_running_loop().call_later(delay_s, self._beat)

    def _beat(self) -> None:
        silence = time.monotonic() - self._taken_at_s
        if silence < self._config.heartbeat_s:
            self._arm_beat(self._config.heartbeat_s - silence)
            return
        self._beat_due = True
        self._taken_at_s = time.monotonic()
        self._awake.set()
        self._arm_beat(self._config.heartbeat_s)

    def _cancel_beat(self) -> None:
        if self._beat_timer is not None:
            self._beat_timer.cancel()
            self._beat_timer = None


def judge(cell: Cell, message: Exit, oom_note: str) -> Ending:
    """What the guest's Exit means, given what the host did and saw.

    `oom_note` is the line about memory if the kernel ended a process of the cell for it, else empty.
    """
    python = cell.request.language == "python"
    lost = "the Python process was killed and restarted, its variables are lost"
    kept = lost if message.restarted else "variables are kept" if python else "the shell and its processes were ended"
    if oom_note and message.reason == DIED:
        note = f"{oom_note}; {lost}" if message.restarted else f"{oom_note}; the shell or a process of it was killed"
        return Ending(events.EXIT_KILLED, "out_of_memory", message.restarted, (note,))
    notes = (oom_note,) if oom_note else ()
    if cell.stopping == STOP_TIMED_OUT:
        line = f"cell timed out after {cell.request.timeout_seconds:g} s; {kept}"
        return Ending(events.EXIT_TIMED_OUT, STOP_TIMED_OUT, message.restarted, (*notes, line))
    if cell.stopping == STOP_DISCONNECTED:
        return Ending(message.code, STOP_DISCONNECTED, message.restarted, notes)
    if cell.stopping == STOP_INTERRUPTED and message.reason in (INTERRUPTED, DIED):
        if message.restarted:
            notes = (*notes, f"the cell did not end when interrupted: {lost}")
        return Ending(message.code, STOP_INTERRUPTED, message.restarted, notes)
    if message.reason == DIED:
        # The guest has said on stderr how the process ended.
        return Ending(message.code, DIED, message.restarted, notes)
    reason = "out_of_memory" if oom_note and message.code == events.EXIT_KILLED else message.reason
    return Ending(message.code, reason, message.restarted, notes)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
