"""File transfers with a guest: one upload or download, with the flow control that keeps memory constant.

Independent of cells.  Knows no HTTP.  Errors of the sandbox's file system become our errors here, by one table.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

import anyio

from podflare.errors import (
    BadRequest,
    DeadlineExceeded,
    FileAccessError,
    FileMissing,
    MachineFailed,
    PodflareError,
    ProtocolError,
    TooLarge,
)
from podflare.host.guest_link import GuestLink
from podflare.wire import frames
from podflare.wire.messages import (
    MAX_PATH_CHARS,
    MISSING,
    WINDOW_BYTES,
    Ack,
    Cancel,
    DataEnd,
    FileDone,
    FileFailed,
    FileOpened,
    FileRead,
    FileWrite,
    GuestMessage,
    from_guest,
)

ACK_BYTES = WINDOW_BYTES // 4
"""Consumed bytes after which the sender is told."""
MAX_FILE_MESSAGE_BYTES = 256 * 1024
MAX_PIECES = 16 * 1024
"""Frames of a download that may wait: a window of single bytes would cost a hundred times its size."""


def check_path(path: str) -> str:
    """`path` if a guest will accept it.  Raises: BadRequest."""
    if not path or "\0" in path or len(path) > MAX_PATH_CHARS:
        raise BadRequest(f"path must have 1 to {MAX_PATH_CHARS} characters and no NUL")
    return path


def _failure(message: FileFailed) -> PodflareError:
    return FileMissing(message.message) if message.reason == MISSING else FileAccessError(message.message)


class _Conversation:
    """What both directions share: the messages of one transfer's channel, and its failure."""

    def __init__(self, link: GuestLink, stall_s: float) -> None:
        self.link = link
        self.failure: PodflareError | None = None
        self._stall_s = stall_s
        self._changed = asyncio.Event()
        self.channel = link.attach(self)

    def on_frame(self, frame: frames.Frame) -> None:
        if frame.kind == frames.DATA:
            self.on_data(frame.payload)
        elif frame.kind != frames.MESSAGE or len(frame.payload) > MAX_FILE_MESSAGE_BYTES:
            raise ProtocolError(f"frame of kind {frame.kind} with {len(frame.payload)} bytes within a file transfer")
        else:
            message = from_guest(frame.payload)
            if isinstance(message, FileFailed):
                self.failure = _failure(message)
            else:
                self.on_message(message)
        self._changed.set()

    def on_data(self, data: bytes) -> None:
        raise ProtocolError("file bytes within an upload")

    def on_message(self, message: GuestMessage) -> None:
        raise ProtocolError(f"message {message.op!r} within a file transfer")

    def on_down(self, cause: str) -> None:
        self.failure = self.failure or MachineFailed(f"the transfer broke off: {cause}")
        self._changed.set()

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Return once `condition` holds.  Raises: the transfer's failure; DeadlineExceeded if the guest is silent."""
        while True:
            if self.failure is not None:
                raise self.failure
            if condition():
                return
            self._changed.clear()
            try:
                with anyio.fail_after(self._stall_s):
                    await self._changed.wait()
            except TimeoutError:
                raise DeadlineExceeded(f"the sandbox did not go on with the file for {self._stall_s:g} s") from None

    def end(self, *, finished: bool) -> None:
        """Leave the channel; an unfinished transfer is cancelled in the guest."""
        if not finished and self.failure is None:
            self.link.say(self.channel, Cancel())
        self.link.detach(self.channel)


class _Upload(_Conversation):
    def __init__(self, link: GuestLink, stall_s: float) -> None:
        super().__init__(link, stall_s)
        self.sent = 0
        self.acknowledged = 0
        self.done: FileDone | None = None

    def on_message(self, message: GuestMessage) -> None:
        if isinstance(message, Ack):
            self.acknowledged += message.bytes
            if self.acknowledged > self.sent:
                raise ProtocolError("more bytes acknowledged than sent")
        elif isinstance(message, FileDone):
            self.done = message
        else:
            super().on_message(message)

    async def send(self, data: memoryview) -> None:
        await self.wait_for(lambda: self.sent - self.acknowledged + len(data) <= WINDOW_BYTES)
        self.link.send_bytes(frames.DATA, self.channel, data)
        self.sent += len(data)


async def upload(
    link: GuestLink,
    path: str,
    chunks: AsyncIterator[bytes],
    *,
    size: int | None,
    limit: int,
    stall_s: float,
) -> int:
    """Write `chunks` to `path` in the sandbox; the file appears whole or not at all.  Returns its size.

    Args:
        size: how many bytes are announced, None if unknown.
        limit: most bytes that are accepted.
        stall_s: silence of the guest after which the transfer is given up.

    Raises: BadRequest for a path no guest accepts; TooLarge above `limit`; FileAccessError if the sandbox's file
        system refuses; DeadlineExceeded; MachineFailed; and what `chunks` raises.
    If cancelled or failed: nothing of it stays in the sandbox.
    """
    check_path(path)
    if size is not None and size > limit:
        raise TooLarge(f"a file of {size} bytes does not fit into the sandbox's disk ({limit} bytes)")
    transfer = _Upload(link, stall_s)
    finished = False
    try:
        link.say(transfer.channel, FileWrite(path))
        async for chunk in chunks:
            if transfer.sent + len(chunk) > limit:
                raise TooLarge(f"the file is larger than the sandbox's disk ({limit} bytes)")
            view = memoryview(chunk)
            for start in range(0, len(view), frames.MAX_DATA_BYTES):
                await transfer.send(view[start : start + frames.MAX_DATA_BYTES])
        link.say(transfer.channel, DataEnd())
        await transfer.wait_for(lambda: transfer.done is not None)
        finished = True
        return transfer.sent
    finally:
        transfer.end(finished=finished)


class Download(_Conversation):
    """A file being read.  `open` it, iterate `chunks`, and `close` it in any case."""

    def __init__(self, link: GuestLink, stall_s: float, closed: Callable[[], None]) -> None:
        super().__init__(link, stall_s)
        self.size: int = -1
        """Bytes when it was opened; what comes may differ if the file changes meanwhile."""
        self._pieces: deque[bytes] = deque()
        self._unacknowledged = 0
        self._consumed = 0
        self._done = False
        self._closed = closed

    @classmethod
    async def open(cls, link: GuestLink, path: str, *, stall_s: float, closed: Callable[[], None]) -> Download:
        """Ask for the file and wait until the guest opened it.  `closed` is called at `close`.

        Raises: BadRequest, FileMissing, FileAccessError, DeadlineExceeded, MachineFailed; then nothing is to close
            and `closed` was not called.
        """
        check_path(path)
        transfer = cls(link, stall_s, closed)
        try:
            link.say(transfer.channel, FileRead(path))
            await transfer.wait_for(lambda: transfer.size >= 0)
        except BaseException:
            transfer.end(finished=False)
            raise
        return transfer

    def on_message(self, message: GuestMessage) -> None:
        if isinstance(message, FileOpened) and self.size < 0:
            self.size = message.size
        elif isinstance(message, FileDone) and self.size >= 0:
            self._done = True
        else:
            super().on_message(message)

    def on_data(self, data: bytes) -> None:
        self._unacknowledged += len(data)
        if self.size < 0 or self._done or self._unacknowledged > WINDOW_BYTES or len(self._pieces) >= MAX_PIECES:
            raise ProtocolError("file bytes out of order or beyond the window")
        if data:
            self._pieces.append(data)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The file's bytes.  Raises: as `open`, if the transfer breaks off."""
        while True:
            # Failure of the file system comes after the bytes before it; they are no use without the rest.
            await self.wait_for(lambda: bool(self._pieces) or self._done)
            while self._pieces:
                piece = self._pieces.popleft()
                yield piece
                self._consumed += len(piece)
                if self._consumed >= ACK_BYTES and not self._done:
                    self.link.say(self.channel, Ack(self._consumed))
                    self._unacknowledged -= self._consumed
                    self._consumed = 0
            if self._done and not self._pieces:
                return

    def close(self) -> None:
        """Idempotent, if `closed` is."""
        self.end(finished=self._done)
        self._done = True
        self._closed()
