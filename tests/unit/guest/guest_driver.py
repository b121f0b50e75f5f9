"""Drives the real guest agent as a child process over a socket pair, from plain synchronous tests."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from podflare.wire import frames
from podflare.wire.messages import (
    Ack,
    DataEnd,
    Error,
    Exec,
    Exit,
    FileDone,
    FileFailed,
    FileOpened,
    FileRead,
    FileWrite,
    HostMessage,
    Interrupt,
    Kill,
    Ready,
    Result,
    from_guest,
    to_payload,
)

TIMEOUT_S = 30.0


@dataclass
class Cell:
    """What one cell gave back, and in which order its frames came."""

    stdout: bytes
    stderr: str
    exit: Exit
    results: list[Result] = field(default_factory=list)
    error: Error | None = None
    order: list[str] = field(default_factory=list)

    @property
    def out(self) -> str:
        return self.stdout.decode()

    @property
    def value(self) -> str | None:
        """text/plain of the last expression's value."""
        values = [result.data["text/plain"] for result in self.results if result.kind == "value"]
        return values[0] if values else None


class Guest:
    """One agent and the host's end of its channel."""

    def __init__(
        self,
        bundle: Path,
        home: Path,
        *,
        python: str = sys.executable,
        environment: dict[str, str] | None = None,
        supervisor: socket.socket | None = None,
    ) -> None:
        """Args: supervisor: the agent's end of its line to who copies whole machines; closed here."""
        self.home = home
        self.sock, theirs = socket.socketpair()
        with theirs:
            fds = [theirs.fileno(), *([] if supervisor is None else [supervisor.fileno()])]
            self.process = subprocess.Popen(
                [python, "-I", "-S", str(bundle), "agent", *map(str, fds)],
                env={"HOME": str(home), **(environment or {})},
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        if supervisor is not None:
            supervisor.close()
        self._decoder = frames.Decoder()
        self._waiting: list[frames.Frame] = []
        self._channel = 0

    def move_to(self, sock: socket.socket) -> None:
        """Speak with the agent over another socket from now on."""
        self.sock.close()
        self.sock, self._decoder, self._waiting = sock, frames.Decoder(), []

    # Frames.

    def send(self, channel: int, message: HostMessage) -> None:
        self.send_frame(frames.MESSAGE, channel, to_payload(message))

    def send_frame(self, kind: int, channel: int, payload: bytes) -> None:
        self.sock.sendall(frames.encode(kind, channel, payload))

    def next_frame(self, channel: int | None = None, timeout_s: float = TIMEOUT_S) -> frames.Frame:
        """The next frame, of `channel` if given; others are kept.  Raises: TimeoutError, EOFError."""
        deadline = time.monotonic() + timeout_s
        while True:
            for number, frame in enumerate(self._waiting):
                if channel in (None, frame.channel):
                    return self._waiting.pop(number)
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.sock], [], [], left)[0]:
                raise TimeoutError(f"no frame of channel {channel} within {timeout_s} s")
            data = self.sock.recv(1 << 20)
            if not data:
                raise EOFError("the agent closed the channel")
            self._waiting += self._decoder.feed(data)

    def new_channel(self) -> int:
        self._channel += 1
        return self._channel

    def wait_ready(self) -> Ready:
        message = from_guest(self.next_frame(0).payload)
        assert isinstance(message, Ready)
        return message

    # Cells.

    def start(self, code: str, language: str = "python", name: str | None = None) -> int:
        channel = self.new_channel()
        self.send(channel, Exec(code=code, language=language, name=name or f"<cell {channel}>"))
        return channel

    def finish(self, channel: int, timeout_s: float = TIMEOUT_S) -> Cell:
        """Everything of a cell up to its exit."""
        parts: dict[int, list[bytes]] = {frames.STDOUT: [], frames.STDERR: []}
        results: list[Result] = []
        error: Error | None = None
        order: list[str] = []
        while True:
            frame = self.next_frame(channel, timeout_s)
            if frame.kind in parts:
                parts[frame.kind].append(frame.payload)
                order.append("stdout" if frame.kind == frames.STDOUT else "stderr")
                continue
            message = from_guest(frame.payload)
            order.append(message.op)
            if isinstance(message, Exit):
                out, err = (b"".join(parts[kind]) for kind in (frames.STDOUT, frames.STDERR))
                return Cell(out, err.decode("utf-8", "replace"), message, results, error, order)
            if isinstance(message, Result):
                results.append(message)
            else:
                assert isinstance(message, Error)
                error = message

    def run(self, code: str, language: str = "python", timeout_s: float = TIMEOUT_S) -> Cell:
        return self.finish(self.start(code, language), timeout_s)

    def bash(self, code: str) -> Cell:
        return self.run(code, "bash")

    def interrupt(self, channel: int) -> None:
        self.send(channel, Interrupt())

    def kill(self, channel: int) -> None:
        self.send(channel, Kill())

    def wait_output(self, channel: int, text: bytes) -> None:
        """Wait until the cell has written `text` to stdout; consumes the frames up to there."""
        seen = b""
        while text not in seen:
            frame = self.next_frame(channel)
            assert frame.kind in (frames.STDOUT, frames.STDERR), from_guest(frame.payload)
            seen += frame.payload

    # Files.

    def write_file(self, path: str, data: bytes) -> FileDone | FileFailed:
        channel = self.new_channel()
        self.send(channel, FileWrite(path))
        for start in range(0, len(data), frames.MAX_DATA_BYTES):
            self.send_frame(frames.DATA, channel, data[start : start + frames.MAX_DATA_BYTES])
        self.send(channel, DataEnd())
        while True:
            message = from_guest(self.next_frame(channel).payload)
            if isinstance(message, (FileDone, FileFailed)):
                return message
            assert isinstance(message, Ack)

    def read_file(self, path: str) -> bytes | FileFailed:
        channel = self.new_channel()
        self.send(channel, FileRead(path))
        parts: list[bytes] = []
        while True:
            frame = self.next_frame(channel)
            if frame.kind == frames.DATA:
                parts.append(frame.payload)
                self.send(channel, Ack(len(frame.payload)))
                continue
            message = from_guest(frame.payload)
            if isinstance(message, FileFailed):
                return message
            if isinstance(message, FileDone):
                assert message.size == sum(map(len, parts))
                return b"".join(parts)
            assert isinstance(message, FileOpened)

    def close(self) -> None:
        """End of the channel must end the agent and everything below it."""
        self.sock.close()
        try:
            assert self.process.wait(timeout=10) is not None
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()


def wait_until(condition, what: str, timeout_s: float = 30.0) -> None:
    """Poll a condition that has no event of its own."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def resident_kib(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") // 1024
