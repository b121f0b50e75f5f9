"""QEMU as the microvm engine's VMM: one process for each VM, ordered over QMP.

A VM is saved by writing its device state (`xen-save-devices-state`, milliseconds) and the pages that it changed
(memory.py); it goes on elsewhere as an incoming migration of the device state alone, over the memory file mapped
privately.  So restoring one takes as long as starting QEMU does, and any number share the pages of one file.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import anyio
from qemu.qmp import EventListener, QMPClient, QMPError
from qemu.qmp.message import Message

from podflare.engines.linux.ending import END_TIMEOUT_S
from podflare.engines.linux.waiting import resolve, to_the_end
from podflare.engines.microvm import memory
from podflare.engines.microvm.confinement import Confinement
from podflare.engines.microvm.console import Console
from podflare.engines.microvm.qemu_command import Descriptors, qemu_command
from podflare.engines.microvm.vmm import Accelerator, BootSource, Drives, SavedVm, Shape
from podflare.errors import MachineFailed

BINARY = "qemu-system-x86_64"
START_TIMEOUT_S = 30.0
ORDER_TIMEOUT_S = 60.0
_DEVICES = "devices"
"""File in the VM's directory that QEMU writes device state to."""
_MONITOR_FAILS = (QMPError, OSError, EOFError, AssertionError)
"""How the end of a QEMU shows at its monitor: qemu.qmp asserts that the connection lasts which it has just made."""


class Qemu:
    """See vmm.Vmm."""

    name = "qemu"
    kernel_kind: Literal["bzImage", "vmlinux"] = "bzImage"
    wire: Literal["socket", "tap"] = "socket"

    def __init__(
        self, binary: str, accelerator: Accelerator, confinement: Confinement, vm: type[QemuVm] | None = None
    ) -> None:
        """Args: vm: what is made, in the place of a QemuVm."""
        self.accelerator = accelerator
        self._vm = vm or QemuVm
        self._binary = binary
        self._confinement = confinement

    async def boot(self, directory: Path, shape: Shape, source: BootSource, drives: Drives) -> QemuVm:
        with contextlib.ExitStack() as stack:
            # As empty as memory is at first: what is written to it becomes the process's own, as for any other VM.
            base = _open(stack, directory / "memory", os.O_RDWR | os.O_CREAT | os.O_EXCL)
            (directory / "memory").unlink()
            os.ftruncate(base, shape.memory_bytes)
            # Through descriptors, for the way to the files may be closed to the VMM's user.
            kernel, initrd = (_open(stack, path, os.O_RDONLY) for path in (source.kernel, source.initrd))
            reached = BootSource(_through(kernel), _through(initrd), source.command_line)
            vm, monitor = self._spawn(stack, directory, shape, drives, base, (kernel, initrd), source=reached)
        return await self._connected(vm, monitor)

    async def restore(self, directory: Path, shape: Shape, saved: SavedVm, drives: Drives) -> QemuVm:
        with contextlib.ExitStack() as stack:
            # For writing, too, as QEMU wants it: the mapping is private all the same.
            base = _open(stack, saved.memory, os.O_RDWR)
            devices = _open(stack, saved.devices, os.O_RDONLY)
            vm, monitor = self._spawn(stack, directory, shape, drives, base, devices=devices)
        return await self._connected(vm, monitor)

    def _spawn(
        self,
        stack: contextlib.ExitStack,
        directory: Path,
        shape: Shape,
        drives: Drives,
        base: int,
        more: tuple[int, ...] = (),
        *,
        source: BootSource | None = None,
        devices: int | None = None,
    ) -> tuple[QemuVm, socket.socket]:
        """A QEMU process and the socket to its monitor.

        Args: stack: owns all descriptors that are given here, and gets those that are QEMU's alone from now on.
        Raises: MachineFailed; then there is no process.
        """
        ours: list[socket.socket] = []
        theirs: list[int] = []
        try:
            for file in (base, directory):
                self._confinement.own(file)
            kinds = [socket.SOCK_STREAM] * 4
            if shape.network:
                # Not datagrams: whoever has such a socket's other end could make it readable for ever.
                kinds.append(socket.SOCK_SEQPACKET)
            for kind in kinds:
                one, other = socket.socketpair(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
                ours.append(one)
                stack.callback(other.close)
                theirs.append(other.fileno())
            root = _open(stack, drives.root, os.O_RDONLY)
            disk = _open(stack, drives.disk, os.O_RDWR)
            self._confinement.own(disk)
            frames = theirs[4] if shape.network else None
            fds = Descriptors(theirs[0], theirs[1], theirs[2], theirs[3], base, root, disk, devices, frames)
            command = qemu_command(self._binary, self.accelerator, shape, fds, source, rate=drives.rate)
            # Waits only for the exec, a millisecond or two.
            process = subprocess.Popen(
                self._confinement.wrap(command),
                cwd=directory,
                env={"PATH": os.environ.get("PATH", os.defpath)},
                stdin=subprocess.DEVNULL,
                stdout=fds.console,
                stderr=fds.console,
                pass_fds=(*fds.all(), *more),
            )
        except OSError as exc:
            for sock in ours:
                sock.close()
            raise MachineFailed(f"QEMU could not be started: {exc}") from exc
        monitor, channel, control, console, *frames_socket = ours
        vm = self._vm(process, directory, os.dup(base), channel, control, Console(console), *frames_socket)
        return vm, monitor

    async def _connected(self, vm: QemuVm, monitor: socket.socket) -> QemuVm:
        try:
            await vm.connect(monitor)
        except BaseException:
            await to_the_end(vm.aclose())
            raise
        return vm


def _open(stack: contextlib.ExitStack, path: Path, flags: int) -> int:
    try:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise MachineFailed(f"a virtual machine's file cannot be opened: {exc}") from exc
    stack.callback(os.close, fd)
    return fd


def _through(fd: int) -> Path:
    return Path(f"/proc/self/fd/{fd}")


class _DiskFaults(EventListener):
    """Hears of writes that the computer's disk did not take; QEMU holds the VM still then."""

    def __init__(self, end: Callable[[str], None]) -> None:
        super().__init__("BLOCK_IO_ERROR")
        self._end = end

    async def put(self, event: Message) -> None:
        data = event.get("data")
        if self.accept(event) and isinstance(data, dict) and data.get("action") == "stop":
            full = bool(data.get("nospace"))
            self._end("the computer's disk is full" if full else f"the computer's disk failed: {data.get('reason')}")


class QemuVm:
    """See vmm.Vm."""

    channels_survive = True

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        directory: Path,
        base: int,
        channel: socket.socket,
        control: socket.socket,
        console: Console,
        frames: socket.socket | None = None,
    ) -> None:
        self.pid = process.pid
        self.channel, self.control, self.console, self.frames = channel, control, console, frames
        for sock in self._sockets:
            sock.setblocking(False)
        self._process = process
        self._directory = directory
        self._base = base
        self._monitor = QMPClient("podflare")
        # Its own log lines would tell what is told by exceptions already.
        self._monitor.logger.disabled = True
        # Nobody reads what the client would remember of events for ever.
        self._monitor.events.names = {"none"}
        self._monitor.register_listener(_DiskFaults(self._give_up))
        self._fault = ""
        self._closing: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        self._gone: asyncio.Future[None] = loop.create_future()
        self._pidfd = os.pidfd_open(process.pid)
        loop.add_reader(self._pidfd, resolve, self._gone)

    @property
    def _sockets(self) -> list[socket.socket]:
        return [sock for sock in (self.channel, self.control, self.frames) if sock is not None]

    async def connect(self, monitor: socket.socket) -> None:
        """Take over the monitor's socket.  Raises: MachineFailed with what QEMU said."""
        try:
            with anyio.fail_after(START_TIMEOUT_S):
                await self._monitor.connect(monitor)
        except _MONITOR_FAILS as exc:
            monitor.close()
            raise MachineFailed(f"QEMU did not start: {await self._last_words() or str(exc) or 'it ended'}") from exc

    async def _last_words(self) -> str:
        with anyio.move_on_after(1):
            await asyncio.shield(self._gone)
        self.console.close()
        return self.console.last_line

    async def _order(self, command: str, **arguments: Any) -> Any:
        try:
            with anyio.fail_after(ORDER_TIMEOUT_S):
                return await self._monitor.execute(command, arguments or None)
        except _MONITOR_FAILS as exc:
            raise MachineFailed(f"a virtual machine did not obey {command!r}: {exc}") from exc

    async def open_channels(self, *, timeout_s: float) -> None:
        """They are connected before QEMU starts, and stay so."""

    async def resume(self) -> None:
        await self._order("cont")

    async def capture(self, to: SavedVm, *, while_paused: Callable[[], Awaitable[None]]) -> float:
        # A caller that gives up must leave neither a VM that stands still nor a thread with a closed descriptor.
        return await to_the_end(self._capture(to, while_paused))

    async def _capture(self, to: SavedVm, while_paused: Callable[[], Awaitable[None]]) -> float:
        loop = asyncio.get_running_loop()
        try:
            target = os.open(to.memory, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                # Before the pause: the file below never changes.
                await loop.run_in_executor(None, memory.copy_sparse, self._base, target)
                start_s = time.monotonic()
                try:
                    await self._order("stop")
                    await while_paused()
                    # Beside each other: saving devices changes nothing of the memory.
                    taking = loop.run_in_executor(None, memory.take_changes, self.pid, self._base, target)
                    try:
                        await self._order("xen-save-devices-state", filename=_DEVICES, live=False)
                    finally:
                        changes = await taking
                finally:
                    await self._order("cont")
                pause_s = time.monotonic() - start_s
                await loop.run_in_executor(None, memory.write_changes, changes, target)
            finally:
                os.close(target)
            await loop.run_in_executor(None, shutil.move, self._directory / _DEVICES, to.devices)
        except OSError as exc:
            raise MachineFailed(f"a virtual machine could not be saved: {exc}") from exc
        return pause_s

    def _give_up(self, fault: str) -> None:
        """End a VM that cannot go on: held still it would only seem to hang."""
        if self._closing is not None:
            return
        self._fault = self._fault or fault
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def wait_dead(self) -> str:
        await asyncio.shield(self._gone)
        status = self._process.wait()
        if self._fault:
            return self._fault
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        return f"QEMU ended {how}"

    async def aclose(self) -> None:
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        # One that hangs in the kernel is not waited for longer; it ends when its device answers.
        done, _ = await asyncio.wait([self._gone], timeout=END_TIMEOUT_S)
        if done:
            self._process.wait()
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        os.close(self._base)
        with contextlib.suppress(*_MONITOR_FAILS):
            with anyio.fail_after(END_TIMEOUT_S):
                await self._monitor.disconnect()
        for sock in self._sockets:
            sock.close()
        self.console.close()
