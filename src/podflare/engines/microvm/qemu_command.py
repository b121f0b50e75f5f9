"""The command line of a QEMU process, pure: what the machine looks like, and what QEMU itself may do.

A VM that goes on from a saved one needs the same machine, so whatever the guest can see follows from these arguments
alone; `machine_key` names it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from podflare.engines.microvm.vmm import (
    CHANNEL_NAME,
    CONTROL_NAME,
    MAC,
    NO_LIMIT,
    Accelerator,
    BootSource,
    DiskRate,
    Shape,
)

TRANSLATED_CODE_MIB = 64
"""Of translated guest code that a process keeps (TCG): it is private to each VM, and the default is half a gigabyte."""

_CPU = {
    # What programs built for x86-64-v2 need (numpy's do); the whole of what TCG can do hangs this kernel.
    "tcg": "Nehalem",
    "kvm": "host",
}
_GLOBALS = (
    # The saved device state is then the same whatever QEMU would say of itself in a migration.
    "migration.send-configuration=off",
    # It would want to find its part of the firmware in memory as it left it.
    "apic.vapic=off",
)
_FORBIDDEN = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True)
class Descriptors:
    """Numbers of what the process inherits."""

    monitor: int
    channel: int
    control: int
    console: int
    memory: int
    root: int
    disk: int
    devices: int | None = None
    """Saved device state to go on from; None to boot."""
    frames: int | None = None
    """Of the network interface, where the VM has one."""

    def all(self) -> tuple[int, ...]:
        found = (self.monitor, self.channel, self.control, self.console, self.memory, self.root, self.disk)
        return (*found, *(fd for fd in (self.devices, self.frames) if fd is not None))


def qemu_command(
    binary: str,
    accelerator: Accelerator,
    shape: Shape,
    fds: Descriptors,
    source: BootSource | None = None,
    *,
    rate: DiskRate = NO_LIMIT,
) -> list[str]:
    """The whole command.

    Args:
        source: what to boot; None with `fds.devices`.
        rate: of the disk; the guest does not see it, so a saved VM goes on with any.
    """
    command = [binary, *_machine(accelerator, shape), "-nodefaults", "-no-user-config", "-display", "none"]
    command += ["-no-reboot", "-sandbox", _FORBIDDEN]
    command += ["-object", _memory(shape, fds.memory)]
    command += ["-chardev", f"socket,id=monitor,fd={fds.monitor}", "-mon", "chardev=monitor,mode=control"]
    command += ["-chardev", f"socket,id=console,fd={fds.console}", "-serial", "chardev:console"]
    command += _drives(fds, rate)
    command += _network(shape, fds.frames)
    command += ["-device", "virtio-serial-pci"]
    for name, fd in ((CHANNEL_NAME, fds.channel), (CONTROL_NAME, fds.control)):
        command += ["-chardev", f"socket,id={name},fd={fd}", "-device", f"virtserialport,chardev={name},name={name}"]
    if fds.devices is not None:
        command += ["-S", "-incoming", f"fd:{fds.devices}"]
    elif source is not None:
        command += ["-kernel", str(source.kernel), "-initrd", str(source.initrd), "-append", source.command_line]
    return command


def machine_key(version: str, accelerator: Accelerator, shape: Shape) -> str:
    """Names a kind of machine: what was saved of one goes on in any other of the same key, and in no other."""
    command = qemu_command("", accelerator, shape, Descriptors(0, 0, 0, 0, 0, 0, 0))
    return hashlib.sha256("\0".join([version, *command]).encode()).hexdigest()[:16]


def _machine(accelerator: Accelerator, shape: Shape) -> list[str]:
    translate = f"tcg,thread=multi,tb-size={TRANSLATED_CODE_MIB}"
    return [
        *("-M", "pc,usb=off,vmport=off,suppress-vmdesc=on,memory-backend=ram"),
        *("-accel", translate if accelerator == "tcg" else accelerator),
        *("-cpu", _CPU[accelerator]),
        *("-m", f"{shape.memory_bytes >> 20}M"),
        *("-smp", str(shape.cpus)),
        *(word for name in _GLOBALS for word in ("-global", name)),
    ]


def _memory(shape: Shape, fd: int) -> str:
    # share=off: the file is mapped privately, so that any number of VMs have one and each its own changes.
    return f"memory-backend-file,id=ram,size={shape.memory_bytes},mem-path=/proc/self/fd/{fd},share=off"


def _network(shape: Shape, fd: int | None) -> list[str]:
    if not shape.network:
        return []
    # No firmware of its own: nothing boots from it.
    device = f"virtio-net-pci,netdev=network,mac={MAC},romfile="
    return ["-netdev", f"dgram,id=network,local.type=fd,local.str={fd}", "-device", device]


def _drives(fds: Descriptors, rate: DiskRate) -> list[str]:
    words: list[str] = []
    throttle = "".join(
        f",throttling.{unit}-total={most},throttling.{unit}-total-max={most}"
        for unit, most in (("bps", rate.bytes_per_s), ("iops", rate.operations_per_s))
        if most
    )
    for name, fd, options in (
        ("root", fds.root, "read-only=on"),
        # A write that fails for the computer's sake is no error of the machine's disk: it is told over the monitor.
        ("disk", fds.disk, f"cache=unsafe,discard=unmap,detect-zeroes=unmap,werror=stop{throttle}"),
    ):
        # Nobody else has this disk, and the root is never written to: no locks.
        words += ["-drive", f"file=/proc/self/fd/{fd},if=none,id={name},format=raw,file.locking=off,{options}"]
        words += ["-device", f"virtio-blk-pci,drive={name}"]
    return words
