"""An engine without any isolation: the real guest in an ordinary child process.  For tests only.

A snapshot of its machines has the files of their home and nothing of their memory.

Passes the engine contract suite, so that everything above engines can be tested on any computer without rights.
User code runs as the daemon's user with all its files and network: no configuration may ever select this engine.
"""

from __future__ import annotations

import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import anyio.abc

from podflare.engines.base import (
    Capability,
    Death,
    EngineReport,
    FileMerge,
    Limits,
    Machine,
    MachineSpec,
    Snapshot,
    UplinkEnds,
    Usage,
    Wall,
)
from podflare.engines.bundle import build_bundle
from podflare.engines.snapshots import SnapshotStore
from podflare.errors import DeadlineExceeded, EgressUnavailable, MachineFailed, NotBuilt, UnknownTemplate
from podflare.wire.api import Diff, TemplateInfo

_END_TIMEOUT_S = 10.0


class FakeMachine:
    """One guest agent as a child process, with a temporary directory as home."""

    walls: tuple[Wall, ...] = ()
    uplink: UplinkEnds | None = None

    def __init__(
        self, spec: MachineSpec, channel: socket.socket, process: anyio.abc.Process, home: Path, owner: FakeEngine
    ) -> None:
        self.id = f"fake-{secrets.token_hex(8)}"
        self.spec = spec
        self.channel = channel
        self.fork_report: dict[str, Any] = {}
        self.home = home
        self._process = process
        self._owner = owner
        self._closing = anyio.Lock()
        self._closed = False

    @property
    def agent_pid(self) -> int:
        """The guest agent, for tests that look at it from outside."""
        return self._process.pid

    async def set_limits(self, limits: Limits) -> None:
        """Only noted: nothing here enforces limits.  Raises: MachineFailed if the machine is dead."""
        if self._process.returncode is not None:
            raise MachineFailed(f"machine {self.id} is dead")
        self.spec = MachineSpec(self.spec.template, limits, self.spec.hostname)

    async def usage(self, *, detail: bool = False) -> Usage:
        return Usage()

    async def fork(self, count: int, *, reseed: bool, timeout_s: float) -> tuple[Machine, ...]:
        raise NotBuilt("the fake engine has no namespaces to fork a machine into")

    async def diff(self, other: Machine, paths: tuple[str, ...], *, detail: bool, timeout_s: float) -> Diff:
        raise NotBuilt("the fake engine has no layers to compare")

    async def merge_files(self, other: Machine, paths: tuple[str, ...], *, timeout_s: float) -> FileMerge:
        raise NotBuilt("the fake engine has no layers to merge")

    async def snapshot(self, name: str, *, note: Mapping[str, Any] | None = None, timeout_s: float) -> None:
        if self._process.returncode is not None:
            raise MachineFailed(f"machine {self.id} is dead")
        with self._owner.saved.keeping(name) as keeping:
            shutil.copytree(self.home, keeping.folder / "home")
            keeping.publish(self.spec, note or {}, {})

    async def wait_dead(self) -> Death:
        status = await self._process.wait()
        return Death("the machine was closed" if self._closed else f"the guest agent ended with status {status}")

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            async with self._closing:
                if self._closed:
                    return
                self._closed = True
                self.channel.close()  # the agent then ends everything below it, and itself
                with anyio.move_on_after(_END_TIMEOUT_S):
                    await self._process.wait()
                if self._process.returncode is None:
                    self._process.kill()
                await self._process.aclose()
                shutil.rmtree(self.home, ignore_errors=True)
                self._owner.forget(self)


class FakeEngine:
    """Makes FakeMachines."""

    name = "fake"
    how = ""
    capabilities: Mapping[Capability, str] = {"snapshot": "the files of its home"}
    pool_size = 4
    expected_memory_bytes = 32 << 20
    rehearsal = ""
    templates: tuple[str, ...] = ("default",)

    def __init__(self, python: str = sys.executable, saved: SnapshotStore | None = None) -> None:
        """Args:
        python: the interpreter that runs the guest, 3.9 or newer.
        saved: where snapshots are kept; None: none can be.
        """
        self.saved = saved or SnapshotStore("", Path())
        self._python = python
        self._bundle: Path | None = None
        self._machines: set[FakeMachine] = set()

    async def probe(self) -> EngineReport:
        return EngineReport(engine=self.name, usable=True, walls=())

    def describe(self, template: str) -> TemplateInfo:
        if template not in self.templates:
            raise UnknownTemplate(f"no template {template!r}; there is: {', '.join(self.templates)}")
        return TemplateInfo(template)

    async def start(self) -> None:
        if self._bundle is None:
            self._bundle = build_bundle(Path(tempfile.mkdtemp(prefix="podflare-bundle-")))

    def can_change(self, made: Limits, wanted: Limits) -> bool:
        return True

    async def create(self, spec: MachineSpec, *, timeout_s: float) -> Machine:
        if spec.template not in self.templates:
            raise UnknownTemplate(f"no template {spec.template!r}; there is: {', '.join(self.templates)}")
        if spec.uplink is not None:
            raise EgressUnavailable("the fake engine's machines have no network of their own")
        if self._bundle is None:
            raise MachineFailed("the engine was not started, or is closed")
        return await self._started(await self._launch(spec, self._bundle), timeout_s)

    async def _started(self, machine: FakeMachine, timeout_s: float) -> FakeMachine:
        try:
            with anyio.fail_after(timeout_s):
                await anyio.wait_readable(machine.channel)
            if not machine.channel.recv(1, socket.MSG_PEEK):
                raise MachineFailed(f"the guest agent ended with status {await machine._process.wait()}")
        except TimeoutError:
            await machine.aclose()
            raise DeadlineExceeded(f"no guest was ready after {timeout_s:g} s") from None
        except BaseException:
            await machine.aclose()
            raise
        return machine

    async def _launch(self, spec: MachineSpec, bundle: Path, files: Path | None = None) -> FakeMachine:
        home = Path(tempfile.mkdtemp(prefix="podflare-home-"))
        if files is not None:
            shutil.copytree(files, home, dirs_exist_ok=True)
        ours, theirs = socket.socketpair()
        try:
            ours.setblocking(False)
            with theirs:
                process = await anyio.open_process(
                    [self._python, "-I", "-S", str(bundle), "agent", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=None,
                    env={"HOME": str(home)},
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            shutil.rmtree(home, ignore_errors=True)
            raise
        machine = FakeMachine(spec, ours, process, home, self)
        self._machines.add(machine)
        return machine

    @property
    def snapshots(self) -> tuple[str, ...]:
        return self.saved.names

    def describe_snapshot(self, name: str) -> Snapshot:
        return self.saved.get(name).about

    async def restore(self, name: str, *, timeout_s: float) -> Machine:
        kept = self.saved.get(name)
        if self._bundle is None:
            raise MachineFailed("the engine was not started, or is closed")
        return await self._started(await self._launch(kept.about.spec, self._bundle, kept.folder / "home"), timeout_s)

    def remove_snapshot(self, name: str) -> None:
        self.saved.remove(name)

    def forget(self, machine: FakeMachine) -> None:
        """Called by a machine that is closed."""
        self._machines.discard(machine)

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            bundle, self._bundle = self._bundle, None
            for machine in list(self._machines):
                await machine.aclose()
            if bundle is not None:
                shutil.rmtree(bundle, ignore_errors=True)
