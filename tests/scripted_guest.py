"""An engine whose guests follow a script: for guests that lie, stall or break the protocol as no real one does."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import anyio
from anyio.abc import TaskGroup

from podflare.engines.base import Capability, Death, EngineReport, Limits, MachineSpec, UplinkEnds, Usage, Wall
from podflare.errors import EgressUnavailable, UnknownTemplate
from podflare.wire import frames
from podflare.wire.api import TemplateInfo
from podflare.wire.messages import Exec, Exit, Message, Ready, from_host, to_payload
from podflare.wire.version import PROTOCOL


class ScriptedGuest:
    """The guest's end of a channel, in the hands of a test."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, machine: ScriptedMachine) -> None:
        self.reader = reader
        self.writer = writer
        self.machine = machine
        self._decoder = frames.Decoder()
        self._frames: list[frames.Frame] = []

    async def next_frame(self) -> frames.Frame:
        """The host's next frame; EOFError when the host is gone."""
        while not self._frames:
            data = await self.reader.read(65536)
            if not data:
                raise EOFError
            self._frames = self._decoder.feed(data)
        return self._frames.pop(0)

    async def next_message(self) -> tuple[int, Message]:
        """Skips file bytes."""
        while (frame := await self.next_frame()).kind != frames.MESSAGE:
            pass
        return frame.channel, from_host(frame.payload)

    async def next_exec(self) -> tuple[int, Exec]:
        """Skips everything before the next cell."""
        while True:
            channel, message = await self.next_message()
            if isinstance(message, Exec):
                return channel, message

    async def say(self, channel: int, message: Message) -> None:
        await self.raw(frames.encode(frames.MESSAGE, channel, to_payload(message)))

    async def output(self, channel: int, data: bytes, kind: int = frames.STDOUT) -> None:
        await self.raw(frames.encode(kind, channel, data))

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def ready(self) -> None:
        await self.say(0, Ready(PROTOCOL, "3.12"))

    async def serve_cells(self) -> None:
        """Answer every cell with its own code as output."""
        while True:
            channel, cell = await self.next_exec()
            await self.output(channel, cell.code.encode())
            await self.say(channel, Exit(0))


Script = Callable[[ScriptedGuest], Awaitable[None]]


class ScriptedMachine:
    """A machine that is only its channel."""

    def __init__(self, spec: MachineSpec, channel: socket.socket, engine: ScriptedEngine) -> None:
        self.id = "scripted-" + secrets.token_hex(4)
        self.engine = engine
        self.fork_report: dict[str, Any] = {}
        self.spec = spec
        self.walls: tuple[Wall, ...] = ()
        self.channel = channel
        self.current_usage = Usage()
        self.closed = False
        self.limits: list[Limits] = []
        self.uplink: UplinkEnds | None = None
        self.scope = anyio.CancelScope()
        self._death: Death | None = None
        self._dead = anyio.Event()

    def die(self, reason: str, *, out_of_memory: bool = False) -> None:
        """As if the kernel had ended it."""
        if self._death is None:
            self._death = Death(reason, out_of_memory=out_of_memory)
            self.scope.cancel()
            self._dead.set()

    async def set_limits(self, limits: Limits) -> None:
        self.limits.append(limits)

    async def usage(self, *, detail: bool = False) -> Usage:
        return self.current_usage

    async def fork(self, count: int, *, reseed: bool, timeout_s: float) -> tuple[ScriptedMachine, ...]:
        return tuple([await self.engine.create(self.spec, timeout_s=timeout_s) for _ in range(count)])

    async def wait_dead(self) -> Death:
        await self._dead.wait()
        assert self._death is not None
        return self._death

    async def aclose(self) -> None:
        self.closed = True
        self.channel.close()
        self.die("the machine was closed")


class ScriptedEngine:
    """Every machine's guest follows `script`.  Its tasks run in `tasks`."""

    name = "scripted"
    templates: tuple[str, ...] = ("default",)
    how = ""
    capabilities: Mapping[Capability, str] = {}
    pool_size = 4
    expected_memory_bytes = 32 << 20
    rehearsal = ""

    def __init__(self, tasks: TaskGroup, script: Script) -> None:
        self.machines: list[ScriptedMachine] = []
        self.infos: dict[str, TemplateInfo] = {}
        self.refuse: Exception | None = None
        self.may_create = anyio.Event()
        self.may_create.set()
        self.asked = 0
        self._tasks = tasks
        self._script = script

    def can_change(self, made: Limits, wanted: Limits) -> bool:
        """Not to much more memory, as of a virtual machine."""
        return wanted.memory_bytes <= 2 * made.memory_bytes

    def describe(self, template: str) -> TemplateInfo:
        if template not in self.templates:
            raise UnknownTemplate(f"unknown template {template!r}")
        return self.infos.get(template, TemplateInfo(template))

    async def probe(self) -> EngineReport:
        return EngineReport(self.name, usable=True, walls=())

    async def start(self) -> None:
        return None

    async def create(self, spec: MachineSpec, *, timeout_s: float) -> ScriptedMachine:
        self.asked += 1
        await self.may_create.wait()
        if self.refuse is not None:
            raise self.refuse
        if spec.uplink is not None:
            raise EgressUnavailable("a scripted machine has no network")
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        machine = ScriptedMachine(spec, ours, self)
        self.machines.append(machine)
        reader, writer = await asyncio.open_unix_connection(sock=theirs)
        self._tasks.start_soon(self._follow, ScriptedGuest(reader, writer, machine))
        return machine

    async def _follow(self, guest: ScriptedGuest) -> None:
        try:
            with guest.machine.scope:
                await self._script(guest)
                await guest.reader.read()
        except (EOFError, ConnectionError):
            pass
        finally:
            guest.writer.transport.abort()

    async def aclose(self) -> None:
        for machine in self.machines:
            await machine.aclose()
