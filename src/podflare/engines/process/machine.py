"""One machine of the process engine, from birth to removal."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from podflare.engines.base import Death, Limits, MachineSpec, Usage, Wall
from podflare.engines.linux.cgroups import Cgroup
from podflare.engines.process.zygote import resolve, wait_readable
from podflare.errors import IsolationIncomplete, MachineFailed

END_TIMEOUT_S = 10.0


@dataclass
class Birth:
    """What a machine is made of; closed as a whole if it does not come to life."""

    directory: Path
    cgroup: Cgroup | None
    channel: socket.socket
    control: socket.socket
    birth: socket.socket
    pidfd: int = -1

    def release_sockets(self) -> None:
        for sock in (self.channel, self.control, self.birth):
            sock.close()


class ProcessMachine:
    """A sandbox's processes below one family.  See engines.base.Machine for the contract."""

    def __init__(self, machine_id: str, spec: MachineSpec, parts: Birth) -> None:
        self.id = machine_id
        self.spec = spec
        self.walls: tuple[Wall, ...] = ()
        self.channel = parts.channel
        self.agent_pid = 0
        self._parts = parts
        self._death: asyncio.Future[Death] = asyncio.get_running_loop().create_future()
        self._closing: asyncio.Task[None] | None = None
        self._watching = False
        self.on_closed: Callable[[ProcessMachine], None] = lambda machine: None

    def watch(self) -> None:
        """Start to watch for the family's end.  Precondition: the machine has been let go."""
        asyncio.get_running_loop().add_reader(self._parts.control.fileno(), self._on_control)
        self._watching = True

    def _on_control(self) -> None:
        try:
            data = self._parts.control.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._unwatch()
        # The family runs no user code, so what it says is trusted.
        status = json.loads(data).get("agent_status") if data else None
        killed = isinstance(status, int) and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        reason = f"the sandbox's first process {_describe(status)}"
        self.declare_dead(Death(reason, out_of_memory=killed and self._oom_kills() > 0))

    def _unwatch(self) -> None:
        if self._watching:
            self._watching = False
            asyncio.get_running_loop().remove_reader(self._parts.control.fileno())

    def _oom_kills(self) -> int:
        return self._parts.cgroup.oom_kills() if self._parts.cgroup else 0

    def declare_dead(self, death: Death) -> None:
        """Record why the machine is gone; the first reason stays."""
        if not self._death.done():
            self._death.set_result(death)

    @property
    def directory(self) -> Path:
        return self._parts.directory

    async def set_limits(self, limits: Limits) -> None:
        if limits == self.spec.limits:
            return
        try:
            if self._parts.cgroup is None:
                raise MachineFailed("limits can only be changed where control groups are available")
            self._parts.cgroup.set_limits(limits)
        except OSError as exc:
            raise MachineFailed(f"machine {self.id}: limits could not be set: {exc}") from exc
        self.spec = MachineSpec(self.spec.template, limits, self.spec.hostname)

    async def usage(self) -> Usage:
        return self._parts.cgroup.usage() if self._parts.cgroup else Usage()

    async def wait_dead(self) -> Death:
        return await asyncio.shield(self._death)

    async def aclose(self) -> None:
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._unwatch()
        self.declare_dead(Death("the machine was closed"))
        try:
            await end_parts(self._parts)
        finally:
            self.on_closed(self)


async def end_parts(parts: Birth) -> None:
    """End every process of a machine and remove all that it left.  Never raises for what is already gone."""
    parts.release_sockets()
    if parts.pidfd >= 0:
        await _end_family(parts.pidfd)
        parts.pidfd = -1
    await asyncio.get_running_loop().run_in_executor(None, _remove, parts)


async def _end_family(pidfd: int) -> None:
    """SIGKILL the family and wait: the kernel ends all below it first (pid_namespaces(7))."""
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass
    loop = asyncio.get_running_loop()
    gone: asyncio.Future[None] = loop.create_future()
    loop.add_reader(pidfd, resolve, gone)
    try:
        await asyncio.wait_for(gone, END_TIMEOUT_S)
    except asyncio.TimeoutError:
        pass  # a process in uninterruptible sleep; the kernel ends it when the device answers
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def _remove(parts: Birth) -> None:
    if parts.cgroup is not None:
        parts.cgroup.remove(timeout_s=END_TIMEOUT_S)
    remove_tree(parts.directory)


def remove_tree(path: Path) -> None:
    """Remove a machine's directory, whatever user code made of it (modes, depth, names).

    Every process that could change it meanwhile is dead.
    """
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except (OSError, RecursionError):
        # Directories without permission, or deeper than Python's stack: the system's tools have no such limits.
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf", "--one-file-system"]):
            subprocess.run([*command, "--", str(path)], stderr=subprocess.DEVNULL, timeout=60, check=False)


async def receive_birth(parts: Birth, timeout_s: float) -> int:
    """Pid of the agent that reports itself confined, as the kernel states it (SCM_CREDENTIALS, unix(7)).

    Raises: IsolationIncomplete with the step that failed; MachineFailed if it died; DeadlineExceeded.
    """
    await wait_readable(parts.birth, timeout_s, "the new machine did not report")
    data, ancillary, _, _ = parts.birth.recvmsg(16384, socket.CMSG_SPACE(struct.calcsize("3i")))
    if not data:
        raise MachineFailed("the new machine died while it was being confined")
    message = json.loads(data)
    if "error" in message:
        raise IsolationIncomplete(f"a machine could not be confined: {message['error']}")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            return int(struct.unpack("3i", content[: struct.calcsize("3i")])[0])
    raise MachineFailed("the new machine reported without credentials")


def _describe(status: object) -> str:
    if not isinstance(status, int):
        return "ended"
    if os.WIFSIGNALED(status):
        return f"was killed by signal {os.WTERMSIG(status)}"
    return f"exited with status {os.WEXITSTATUS(status)}"
