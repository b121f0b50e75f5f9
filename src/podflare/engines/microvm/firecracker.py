"""Firecracker as the microvm engine's VMM: one process for each VM, ordered over HTTP on a Unix socket.

A VM is saved as device state and the memory that it changed since it was saved last; it goes on elsewhere with the
memory file mapped privately.  As root each process is in the jailer's jail: a file system with nothing but the files
of its VM, another user.  Needs KVM.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import anyio
import httpx

from podflare.engines.linux.ending import END_TIMEOUT_S
from podflare.engines.linux.waiting import resolve, to_the_end
from podflare.engines.microvm import firecracker_orders as orders
from podflare.engines.microvm import memory
from podflare.engines.microvm.confinement import Confinement
from podflare.engines.microvm.console import Console
from podflare.engines.microvm.disks import copy_disk
from podflare.engines.microvm.firecracker_orders import Order
from podflare.engines.microvm.tap import Entrance, Tap
from podflare.engines.microvm.vmm import (
    CHANNEL_VSOCK_PORT,
    CONTROL_VSOCK_PORT,
    Accelerator,
    BootSource,
    Drives,
    SavedVm,
    Shape,
)
from podflare.engines.microvm.vsock import connect
from podflare.errors import MachineFailed

BINARY, JAILER = "firecracker", "jailer"
START_TIMEOUT_S = 15.0
ORDER_TIMEOUT_S = 60.0
VERSION_TIMEOUT_S = 10.0
_START_POLL_S = 0.002
_MAX_FAULT_CHARS = 500
_SIGNALLED = 128
"""What a shell adds to the number of the signal that ended a program."""


@dataclass(frozen=True)
class Programs:
    """What was found on this computer."""

    firecracker: str
    jailer: str | None
    version: str


def find(binary: str = BINARY) -> Programs:
    """Firecracker by name or path, and the jailer beside it or on the PATH.  Blocks for a moment.

    Raises: MachineFailed that says what is missing, or too old, and what to do.
    """
    path = shutil.which(binary)
    if path is None:
        where = "is no program" if os.sep in binary else "is not on the PATH, and --firecracker does not name it"
        raise MachineFailed(f"{binary} {where} (github.com/firecracker-microvm/firecracker/releases)")
    version = _version_of(path)
    problem = orders.problem_with(version)
    if problem:
        raise MachineFailed(problem)
    beside = Path(path).resolve().with_name(Path(path).resolve().name.replace(BINARY, JAILER, 1))
    jailer = str(beside) if os.access(beside, os.X_OK) else shutil.which(JAILER)
    if jailer is None and os.geteuid() == 0:
        raise MachineFailed(f"the jailer of Firecracker, which root needs, is neither beside {path} nor on the PATH")
    return Programs(path, jailer if os.geteuid() == 0 else None, version.split()[-1].removeprefix("v"))


def _version_of(path: str) -> str:
    try:
        told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as exc:
        raise MachineFailed(f"{path} does not start: {exc}") from exc
    return (told.stdout.splitlines() or [""])[0]


class Firecracker:
    """See vmm.Vmm."""

    name = "firecracker"
    accelerator: Accelerator = "kvm"
    kernel_kind: Literal["bzImage", "vmlinux"] = "vmlinux"
    wire: Literal["socket", "tap"] = "tap"

    def __init__(self, programs: Programs, confinement: Confinement) -> None:
        self._programs, self._confinement = programs, confinement

    async def boot(self, directory: Path, shape: Shape, source: BootSource, drives: Drives) -> FirecrackerVm:
        files = {orders.KERNEL: source.kernel, orders.INITRD: source.initrd, **_drives(drives)}
        base = os.memfd_create("podflare-empty", os.MFD_CLOEXEC)  # what a VM's memory is at first
        os.ftruncate(base, shape.memory_bytes)
        vm = await self._started(directory, shape, files, base)
        await vm.prepared(orders.boot_orders(shape, source.command_line))
        return vm

    async def restore(self, directory: Path, shape: Shape, saved: SavedVm, drives: Drives) -> FirecrackerVm:
        files = {orders.MEMORY: saved.memory, orders.DEVICES: saved.devices, **_drives(drives)}
        try:
            base = os.open(saved.memory, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise MachineFailed(f"a virtual machine's file cannot be opened: {exc}") from exc
        vm = await self._started(directory, shape, files, base)
        await vm.prepared((orders.load_order(), orders.rate_order(drives.rate)))
        return vm

    async def _started(self, directory: Path, shape: Shape, files: dict[str, Path], base: int) -> FirecrackerVm:
        """A process that takes orders; it owns `base`.

        Raises: MachineFailed, EgressUnavailable, DeadlineExceeded; then there is none.
        """
        vm: FirecrackerVm | None = None
        tap: Tap | None = None
        try:
            tap = Tap(self._confinement.user_id) if shape.network else None
            # Copies at most what lies on another file system.
            root = await asyncio.get_running_loop().run_in_executor(None, self._place, directory, files)
            entrance = await tap.entrance() if tap is not None else None
            vm = self._spawn(directory, root, base, entrance)
            if tap is not None:
                vm.frames = await tap.frames()
            await vm.wait_ready()
            if self._programs.jailer is not None:
                vm.pid = _guarded_pid(vm.pid)
            return vm
        except BaseException as exc:
            if vm is None:
                os.close(base)
            else:
                with anyio.CancelScope(shield=True):
                    await vm.aclose()
            if isinstance(exc, OSError):
                raise MachineFailed(f"Firecracker could not be started: {exc}") from exc
            raise
        finally:
            if tap is not None:
                tap.close()

    def _spawn(self, directory: Path, root: Path, base: int, entrance: Entrance | None) -> FirecrackerVm:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        with theirs:
            try:
                process = subprocess.Popen(
                    self._command(directory, entrance),
                    cwd=root,
                    env={"PATH": os.environ.get("PATH", os.defpath)},
                    stdin=subprocess.DEVNULL,
                    stdout=theirs.fileno(),
                    stderr=theirs.fileno(),
                )
            except OSError:
                ours.close()
                raise
        return FirecrackerVm(process, root, base, Console(ours))

    def _command(self, directory: Path, entrance: Entrance | None) -> list[str]:
        binary, jailer, user_id = self._programs.firecracker, self._programs.jailer, self._confinement.user_id
        if jailer is None or user_id is None:
            return self._confinement.wrap(orders.firecracker_command(binary, directory.name), entrance)
        # The jailer drops all privileges itself, for which it needs them first.
        jailed = orders.jailer_command(jailer, binary, directory.name, directory / "jail", user_id)
        return orders.guarded(jailed) if entrance is None else entrance.wrap(orders.guarded(jailed, network=False))

    def _place(self, directory: Path, files: dict[str, Path]) -> Path:
        """The VM's directory as its process sees it, with its files under the names that orders use."""
        if self._programs.jailer is None:
            for name, path in files.items():
                if path != directory / name:
                    (directory / name).symlink_to(path)
            return directory
        root = orders.jail_root(directory / "jail", self._programs.firecracker, directory.name)
        root.mkdir(parents=True, mode=0o755)
        self._confinement.own(root)
        for name, path in files.items():
            try:
                (root / name).hardlink_to(path)
            except OSError:
                copy_disk(path, root / name)  # another file system
            if name == orders.DISK:
                self._confinement.own(root / name)
            else:
                # To be read by the VMM alone: many VMs have the same file.  The way to it is closed elsewhere.
                (root / name).chmod((root / name).stat().st_mode & 0o7777 | 0o444)
        return root


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _guarded_pid(pid: int) -> int:
    """The VMM below its guards (firecracker_orders.guarded).  Raises: MachineFailed if it is gone."""
    for _ in range(2):
        below = _children(pid)
        if len(below) != 1:
            raise MachineFailed("Firecracker ended as soon as it had started")
        [pid] = below
    return pid


def _unconnected() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)


def _drives(drives: Drives) -> dict[str, Path]:
    return {orders.ROOT: drives.root, orders.DISK: drives.disk}


class FirecrackerVm:
    """See vmm.Vm."""

    channels_survive = False
    """The device ends them with each capture (vsock.py)."""

    def __init__(self, process: subprocess.Popen[bytes], root: Path, base: int, console: Console) -> None:
        self.pid = process.pid
        self.console = console
        self._process, self._root, self._base = process, root, base
        # The paths of sockets are short however long that of the directory is.
        self._folder = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        here = Path(f"/proc/self/fd/{self._folder}")
        self._api = str(here / orders.API_SOCKET)
        transport = httpx.AsyncHTTPTransport(uds=self._api, verify=False)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://firecracker", timeout=ORDER_TIMEOUT_S)
        self._device = here / orders.VSOCK
        self.channel, self.control = (_unconnected() for _ in range(2))
        self.frames: socket.socket | None = None
        self._closing: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        self._gone: asyncio.Future[None] = loop.create_future()
        self._pidfd = os.pidfd_open(process.pid)
        loop.add_reader(self._pidfd, resolve, self._gone)

    async def wait_ready(self) -> None:
        """Until it takes orders.  Raises: MachineFailed with what it said."""
        ends_s = time.monotonic() + START_TIMEOUT_S
        while not await self._listens():
            if self._gone.done() or time.monotonic() > ends_s:
                raise MachineFailed(f"Firecracker did not start: {self._last_words()}")
            await asyncio.sleep(_START_POLL_S)

    async def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sock:
            try:
                await asyncio.get_running_loop().sock_connect(sock, self._api)
            except (FileNotFoundError, ConnectionRefusedError):
                return False  # the file is there a moment before anybody listens
        return True

    def _last_words(self) -> str:
        self.console.close()
        return self.console.last_line or "it said nothing"

    async def prepared(self, wanted: tuple[Order, ...]) -> None:
        """Carry out the first orders.  Raises: MachineFailed; then the process is gone, as on cancellation."""
        try:
            for order in wanted:
                await self.order(order)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.aclose()
            raise

    async def order(self, order: Order) -> dict[str, Any]:
        """One request of the API; what it answers.  Raises: MachineFailed with Firecracker's reason."""
        body = dict(order.body) if order.method != "GET" else None
        try:
            answer = await self._client.request(order.method, order.path, json=body)
            told = answer.json() if answer.content else {}
        except (httpx.HTTPError, OSError, ValueError) as exc:
            raise MachineFailed(f"Firecracker did not answer {order.path}: {exc or type(exc).__name__}") from exc
        if answer.status_code >= 300 or not isinstance(told, dict):
            reason = told.get("fault_message", told) if isinstance(told, dict) else told
            raise MachineFailed(f"Firecracker refused {order.path}: {str(reason)[:_MAX_FAULT_CHARS]}")
        return told

    async def open_channels(self, *, timeout_s: float) -> None:
        opening = asyncio.get_running_loop().create_task(self._open_channels(timeout_s))
        try:
            await asyncio.wait([opening, self._gone], return_when=asyncio.FIRST_COMPLETED)
        finally:
            opening.cancel()
            await asyncio.wait([opening])
        if opening.cancelled():
            raise MachineFailed(f"the virtual machine is gone: {await self.wait_dead()}")
        opening.result()

    async def _open_channels(self, timeout_s: float) -> None:
        ends_s = time.monotonic() + timeout_s
        for name, port in (("channel", CHANNEL_VSOCK_PORT), ("control", CONTROL_VSOCK_PORT)):
            sock = await connect(self._device, port, timeout_s=max(0.0, ends_s - time.monotonic()))
            getattr(self, name).close()
            setattr(self, name, sock)

    async def resume(self) -> None:
        await self.order(orders.state_order("Resumed"))

    async def capture(self, to: SavedVm, *, while_paused: Callable[[], Awaitable[None]]) -> float:
        # A caller that gives up must leave neither a VM that stands still nor a thread with a closed descriptor.
        return await to_the_end(self._capture(to, while_paused))

    async def _capture(self, to: SavedVm, while_paused: Callable[[], Awaitable[None]]) -> float:
        loop = asyncio.get_running_loop()
        target = os.open(to.memory, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Before the pause: the file below never changes.
            await loop.run_in_executor(None, memory.copy_sparse, self._base, target)
            for name in (orders.DEVICES, orders.CHANGES):
                (self._root / name).unlink(missing_ok=True)
            start_s = time.monotonic()
            await self.order(orders.state_order("Paused"))
            try:
                await while_paused()
                await self.order(orders.save_order())
            finally:
                await self.order(orders.state_order("Resumed"))
            pause_s = time.monotonic() - start_s
            await loop.run_in_executor(None, self._take, target, to)
        except OSError as exc:
            raise MachineFailed(f"a virtual machine could not be saved: {exc}") from exc
        finally:
            os.close(target)
        return pause_s

    def _take(self, target: int, to: SavedVm) -> None:
        """Make the saved memory whole; what it is now is what later changes are changes of."""
        changes = self._root / orders.CHANGES
        with changes.open("rb") as file:
            memory.lay_over(file.fileno(), target)
        changes.unlink()
        shutil.move(self._root / orders.DEVICES, to.devices)
        os.dup2(target, self._base, inheritable=False)

    async def wait_dead(self) -> str:
        await asyncio.shield(self._gone)
        status = self._process.wait()
        if status > _SIGNALLED:  # said by its guards
            status = _SIGNALLED - status
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        return f"Firecracker ended {how}"

    async def aclose(self) -> None:
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            # The first process of a guarded VMM's namespace takes all others with it before it is gone itself.
            for pid in _children(self._process.pid):
                os.kill(pid, signal.SIGKILL)
            if self.pid == self._process.pid:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        done, _ = await asyncio.wait([self._gone], timeout=END_TIMEOUT_S)
        if done:
            self._process.wait()
        asyncio.get_running_loop().remove_reader(self._pidfd)
        for sock in (self.channel, self.control, self.frames):
            if sock is not None:
                sock.close()
        await self._client.aclose()
        for fd in (self._pidfd, self._base, self._folder):
            os.close(fd)
        self.console.close()
