"""Drives a machine's guest without daemon and HTTP: one cell at a time, whole output at the end."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import anyio.from_thread

from podflare.engines.base import Engine, Limits, Machine, MachineSpec
from podflare.wire import frames
from podflare.wire.messages import Error, Exec, Exit, Interrupt, Kill, Ready, Result, from_guest, to_payload
from podflare.wire.uplink import Uplink

LIMITS = Limits(memory_bytes=512 * 2**20, disk_bytes=4 * 2**30, max_processes=128)
CELL_TIMEOUT_S = 60.0


@dataclass
class CellOutput:
    """What one cell gave back."""

    stdout: str
    stderr: str
    exit: Exit
    results: list[Result] = field(default_factory=list)
    error: Error | None = None


class DrivenMachine:
    """A machine and the host's end of its conversation."""

    def __init__(self, portal: anyio.from_thread.BlockingPortal, machine: Machine) -> None:
        self._portal = portal
        self.machine = machine
        self._channel = 0
        self._begin()

    def _begin(self) -> None:
        """Read the first word of a conversation."""
        self._spoken = self.machine.channel
        self._decoder = frames.Decoder()
        self._pending: list[frames.Frame] = []
        assert isinstance(from_guest(self._next(10).payload), Ready)

    def rejoin(self) -> None:
        """After a fork or a snapshot: go on over the machine's channel of now."""
        if self.machine.channel is not self._spoken:
            self._begin()

    @classmethod
    def create(
        cls,
        portal: anyio.from_thread.BlockingPortal,
        engine: Engine,
        limits: Limits = LIMITS,
        uplink: Uplink | None = None,
    ) -> DrivenMachine:
        """A new machine of the default template."""
        spec = MachineSpec("default", limits, uplink=uplink)
        return cls(portal, portal.call(lambda: engine.create(spec, timeout_s=30)))

    def fork(self, count: int = 1, *, reseed: bool = True, timeout_s: float = 60) -> list[DrivenMachine]:
        """Forks of this machine, to be closed by the caller."""
        try:
            children = self._portal.call(lambda: self.machine.fork(count, reseed=reseed, timeout_s=timeout_s))
        finally:
            if self.machine.channel.fileno() >= 0:
                self.rejoin()
        driven = [DrivenMachine(self._portal, child) for child in children]
        for one in driven:
            one._channel = self._channel  # cells of one memory must not share names
        return driven

    @property
    def host_pid(self) -> int:
        """The process of the computer that guards it: its agent, or its hypervisor."""
        machine: Any = self.machine
        return int(machine.vm.pid if hasattr(machine, "vm") else machine.agent_pid)

    def snapshot(self, name: str) -> None:
        """Keep this machine as it is now."""
        try:
            self._portal.call(lambda: self.machine.snapshot(name, timeout_s=60))
        finally:
            self.rejoin()

    def call(self, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> Any:
        """Run a coroutine function of the machine on the engine's loop."""
        return self._portal.call(function, *args)

    def start(self, code: str, language: str = "python") -> int:
        """Send a cell, return its channel."""
        self._channel += 1
        self.send(Exec(code=code, language=language, name=f"<cell {self._channel}>"))
        return self._channel

    def send(self, message: Exec | Interrupt | Kill) -> None:
        self._send_all(frames.encode(frames.MESSAGE, self._channel, to_payload(message)))

    def _send_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            select.select([], [self.machine.channel], [], 30)
            view = view[self.machine.channel.send(view) :]

    def finish(self, timeout_s: float = CELL_TIMEOUT_S) -> CellOutput:
        """Everything of the running cell up to its exit.  Raises: TimeoutError, ConnectionError."""
        deadline = time.monotonic() + timeout_s
        out: dict[int, list[bytes]] = {frames.STDOUT: [], frames.STDERR: []}
        results: list[Result] = []
        error: Error | None = None
        while True:
            frame = self._next(deadline - time.monotonic())
            if frame.kind in out:
                out[frame.kind].append(frame.payload)
                continue
            message = from_guest(frame.payload)
            if isinstance(message, Exit):
                texts = [b"".join(out[kind]).decode("utf-8", "replace") for kind in (frames.STDOUT, frames.STDERR)]
                return CellOutput(texts[0], texts[1], message, results, error)
            if isinstance(message, Result):
                results.append(message)
            elif isinstance(message, Error):
                error = message

    def run(self, code: str, language: str = "python", timeout_s: float = CELL_TIMEOUT_S) -> CellOutput:
        """Run a cell to its end."""
        self.start(code, language)
        return self.finish(timeout_s)

    def _next(self, timeout_s: float) -> frames.Frame:
        while not self._pending:
            if timeout_s <= 0 or not select.select([self.machine.channel], [], [], timeout_s)[0]:
                raise TimeoutError("the guest said nothing")
            data = self.machine.channel.recv(1 << 16)
            if not data:
                raise ConnectionError("the guest closed the channel")
            self._pending = self._decoder.feed(data)
        return self._pending.pop(0)

    def close(self) -> None:
        self._portal.call(self.machine.aclose)
