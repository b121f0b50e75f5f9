"""What the microvm engine asks of a virtual machine monitor (VMM), and what it gives one: plain data and two Protocols.

Knows neither QEMU nor Firecracker, neither guests nor sandboxes.  Whoever boots or restores a `Vm` owns it.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from podflare.engines.microvm.console import Console

Accelerator = Literal["kvm", "tcg"]
"""How guest instructions run: by the processor itself, or translated, which works everywhere and computes slowly."""

CHANNEL_NAME = "podflare.channel"
CONTROL_NAME = "podflare.control"
"""Names of the ports in the guest (virtio-serial); under vsock they are the ports below."""
CHANNEL_VSOCK_PORT = 7000
CONTROL_VSOCK_PORT = 7001
MAC = "52:54:00:00:00:01"
"""Of every VM's network interface: each has a network of its own."""


@dataclass(frozen=True)
class Shape:
    """What a VM looks like from inside; a saved one can only go on in the same."""

    memory_bytes: int
    cpus: int
    network: bool = False
    """Whether it has a network interface, whose frames are `Vm.frames`."""


@dataclass(frozen=True)
class BootSource:
    """What a VM boots from."""

    kernel: Path
    """As the VMM wants it (`Vmm.kernel_kind`)."""
    initrd: Path
    command_line: str


@dataclass(frozen=True)
class DiskRate:
    """How much a VM may read and write in a second, of which one second's worth at once; 0: as much as it can."""

    bytes_per_s: int = 0
    operations_per_s: int = 0


NO_LIMIT = DiskRate()


@dataclass(frozen=True)
class Drives:
    """The block devices of a VM, in the order in which the guest sees them."""

    root: Path
    """Read-only, the same for many VMs: /dev/vda."""
    disk: Path
    """Raw, of this VM alone: /dev/vdb."""
    rate: DiskRate = NO_LIMIT
    """Of `disk`, for a VM that is restored, whatever it was saved with; one that boots runs nobody's code."""


@dataclass(frozen=True)
class SavedVm:
    """A saved VM on the host's disk.  Its drives are kept beside it by the engine, as they were at the same moment."""

    memory: Path
    """As large as the VM's memory, sparse.  VMs that go on from it map it privately: it never changes."""
    devices: Path
    """Processor and device state, in the VMM's own format and of its version."""


@dataclass(frozen=True)
class VmmStatus:
    """Whether a VMM can be used on this computer."""

    vmm: str
    usable: bool
    accelerator: Accelerator | None
    version: str = ""
    detail: str = ""
    """Which one is taken and why; or what is missing and what to do."""


class Vm(Protocol):
    """One running VM and its VMM process."""

    pid: int
    channels_survive: bool
    """Whether `channel` and `control` go on after a capture; else all that was under way in them is lost then."""
    channel: socket.socket
    """Non-blocking stream to the guest's port CHANNEL_NAME, connected by `open_channels`.  Closed by `aclose`."""
    control: socket.socket
    """Likewise to CONTROL_NAME."""
    frames: socket.socket | None
    """With `Shape.network`: what its interface sends and receives, one Ethernet frame a packet; see
    engines.base.UplinkEnds.  Non-blocking.  Closed by `aclose`."""
    console: Console
    """What the guest's kernel and init print, and the VMM itself."""

    async def open_channels(self, *, timeout_s: float) -> None:
        """Connect `channel` and `control`: after the boot, after `resume`, and where they do not survive it after each
        capture, also one that failed.

        New sockets take the place of the old, which are closed.  Nothing to do, and no await, where channels survive.
        Raises: MachineFailed if the VM is gone; DeadlineExceeded if nobody in it listens.
        """

    async def capture(self, to: SavedVm, *, while_paused: Callable[[], Awaitable[None]]) -> float:
        """Save the VM as it is now; it goes on at once.

        Args:
            to: files that do not exist yet.
            while_paused: called while nothing in the VM moves and its disk is quiet, to copy that.
        Returns: for how many seconds it stood still.
        Raises: MachineFailed if the VMM could not save it, or is gone; the files are then the caller's to remove.
            The VM goes on in any case, as long as its VMM lives.
        If cancelled: once it is saved and goes on.
        """

    async def resume(self) -> None:
        """Let a restored VM go on.  Raises: MachineFailed."""

    async def wait_dead(self) -> str:
        """Return, once the VMM has ended, how, in one line.  Any number of waiters."""

    async def aclose(self) -> None:
        """End the VMM and release all but its files.  Idempotent; shielded from cancellation inside."""


class Vmm(Protocol):
    """Starts VMs of one kind."""

    name: str
    accelerator: Accelerator
    kernel_kind: Literal["bzImage", "vmlinux"]
    wire: Literal["socket", "tap"]
    """What `Vm.frames` is made of, where a VM has a network interface."""

    async def boot(self, directory: Path, shape: Shape, source: BootSource, drives: Drives) -> Vm:
        """A VM that has begun to boot.

        Args: directory: of this VM alone, exists, and is the VMM's to write in.
        Raises: MachineFailed with what the VMM said; EgressUnavailable if it is to have a network interface and can
            have none here.  Then no process is left.
        If cancelled: no process is left.
        """

    async def restore(self, directory: Path, shape: Shape, saved: SavedVm, drives: Drives) -> Vm:
        """A VM loaded from `saved`, standing still until `Vm.resume`; changes to its memory are its own.

        Any number may be restored from one saved VM at a time.  The files of `saved` may be removed as soon as this
        has returned.  Raises and cancellation as `boot`.
        """
