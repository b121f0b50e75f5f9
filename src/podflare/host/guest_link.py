"""The one conversation with a guest, for every engine: frames in and out of a machine's channel, routed by number.

Knows no cells and no files: who opens a conversation gives a `Listener` and gets its frames.  Every byte that
arrives is hostile: the first one that breaks the protocol ends the link, and with it the machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, cast

import anyio

from podflare.engines.base import Machine
from podflare.errors import DeadlineExceeded, MachineFailed, ProtocolError, TooLarge
from podflare.wire.frames import HEADER, MAX_MESSAGE_BYTES, MESSAGE, Decoder, Frame, check_header, encode
from podflare.wire.messages import HostMessage, Ready, from_guest, to_payload
from podflare.wire.version import check_protocol

MAX_READY_BYTES = 4096


class Listener(Protocol):
    """One conversation: a cell or a file transfer.  Both calls come from the event loop and must not block."""

    def on_frame(self, frame: Frame) -> None:
        """A frame of this conversation.  Raises: ProtocolError if the guest may not say this; the link ends."""

    def on_down(self, cause: str) -> None:
        """The link ended; no frame follows.  Called at most once."""


class GuestLink(asyncio.Protocol):
    """The host's end of a machine's channel.  Made by `open`; ended by `close` or by the guest."""

    def __init__(self) -> None:
        self._decoder = Decoder()
        self._listeners: dict[int, Listener] = {}
        self._last_channel = 0
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._greeted = asyncio.Event()
        self._ready: Ready | None = None
        self._holds = 0
        self.down = ""
        """Why the link ended; empty while it lives."""
        self._expected = ""
        self.when_down: Callable[[str, bool], None] | None = None
        """Called once when the link ends by the guest's doing: the cause, and whether the guest broke the protocol."""

    @classmethod
    async def open(cls, machine: Machine, *, timeout_s: float) -> GuestLink:
        """Take over `machine.channel` and read the guest's Ready.

        The link works on a duplicate of the socket: the machine keeps and closes its own.

        Raises: MachineFailed if the guest is gone or breaks the protocol; DeadlineExceeded after timeout_s.
        If cancelled or failed: the duplicate is closed; the machine is still the caller's to close.
        """
        loop = asyncio.get_running_loop()
        duplicate = machine.channel.dup()
        duplicate.setblocking(False)
        try:
            _, link = await loop.create_unix_connection(cls, sock=duplicate)
        except BaseException:
            duplicate.close()
            raise
        try:
            with anyio.fail_after(timeout_s):
                await link._greeted.wait()
        except TimeoutError:
            link.close()
            raise DeadlineExceeded(f"machine {machine.id}: no Ready from its guest within {timeout_s:g} s") from None
        except BaseException:
            link.close()
            raise
        if link.down:
            raise MachineFailed(f"machine {machine.id}: {link.down}")
        return link

    # Conversations.

    def attach(self, listener: Listener) -> int:
        """A new conversation's channel.  Raises: MachineFailed if the link ended."""
        if self.down:
            raise MachineFailed(self.down)
        self._last_channel += 1
        if self._last_channel >= 2**32:
            raise MachineFailed("all frame channels of this machine are used up")
        self._listeners[self._last_channel] = listener
        return self._last_channel

    def detach(self, channel: int) -> None:
        """The conversation is over; frames that still arrive for it are dropped.  Idempotent."""
        self._listeners.pop(channel, None)

    def say(self, channel: int, message: HostMessage) -> None:
        """Send a message.  Does nothing if the link ended.

        Raises: TooLarge if the message is above what one frame holds.
        """
        payload = to_payload(message)
        if len(payload) > MAX_MESSAGE_BYTES:
            raise TooLarge(f"{message.op}: {len(payload)} bytes when encoded, the cap is {MAX_MESSAGE_BYTES}")
        if self._transport is not None and not self.down:
            self._transport.write(encode(MESSAGE, channel, payload))

    def send_bytes(self, kind: int, channel: int, payload: bytes | memoryview) -> None:
        """Send raw bytes; the caller awaits `wait_writable` before the next ones."""
        check_header(len(payload), kind)
        if self._transport is not None and not self.down:
            self._transport.writelines([HEADER.pack(len(payload), kind, channel), payload])

    async def wait_writable(self) -> None:
        """Return once the guest took most of what was sent, or the link ended."""
        await self._writable.wait()

    def hold(self) -> None:
        """Stop reading from the guest until `unhold`; calls nest."""
        self._holds += 1
        if self._holds == 1 and self._transport is not None and not self.down:
            self._transport.pause_reading()

    def unhold(self) -> None:
        self._holds -= 1
        if self._holds == 0 and self._transport is not None and not self.down:
            self._transport.resume_reading()

    def close(self, cause: str = "the host closed the link") -> None:
        """End the link.  Idempotent; listeners are told the cause, `when_down` is not called."""
        self.when_down = None
        self._end(cause)

    def expect_end(self, cause: str) -> None:
        """If the guest's side ends from now on that is why, and `when_down` is not called; "": no longer."""
        self._expected = cause

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not every event loop's transports are of asyncio's classes, but they all have this interface.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self.down:
            return
        try:
            for frame in self._decoder.feed(data):
                listener = self._listeners.get(frame.channel)
                if listener is not None:
                    listener.on_frame(frame)
                elif not self._greeted.is_set():
                    self._greet(frame)
                # Other channels: the rest of a conversation that is over here, which the guest cannot know yet.
        except ProtocolError as exc:
            self._end(f"the guest broke the protocol: {exc}", violation=True)

    def _greet(self, frame: Frame) -> None:
        if frame.kind != MESSAGE or frame.channel != 0 or len(frame.payload) > MAX_READY_BYTES:
            raise ProtocolError("the first frame is not Ready")
        message = from_guest(frame.payload)
        if not isinstance(message, Ready):
            raise ProtocolError(f"the first message is {message.op!r}, not Ready")
        check_protocol(message.protocol)
        self._ready = message
        self._greeted.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(self._expected or (f"the guest's channel broke: {exc}" if exc else "the guest closed its channel"))

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _end(self, cause: str, *, violation: bool = False) -> None:
        if self.down:
            return
        self.down = cause
        if self._transport is not None:
            # abort, not close: a guest that never reads would keep a closing transport alive.
            self._transport.abort()
        self._writable.set()
        self._greeted.set()
        listeners, self._listeners = list(self._listeners.values()), {}
        for listener in listeners:
            listener.on_down(cause)
        if self.when_down is not None and (violation or not self._expected):
            self.when_down(cause, violation)
            self.when_down = None
