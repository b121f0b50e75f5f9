"""What Firecracker is told, pure: orders of its HTTP API, command lines, and which versions know them.

Paths are relative to the VM's own directory, so that any number of VMs go on from one saved state, which names the
same files in the directory of each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from podflare.engines.microvm import tap
from podflare.engines.microvm.vmm import MAC, DiskRate, Shape

OLDEST, BEFORE = (1, 10), (2, 0)
"""Since 1.10 a guest hears as soon as its VM goes on that a capture or a restore has ended its connections."""
API_SOCKET, VSOCK, KERNEL, INITRD, ROOT, DISK = "api", "vsock", "kernel", "initrd", "root", "disk"
"""Names in the VM's directory."""
MEMORY, DEVICES, CHANGES = "memory", "devices", "changes"
INTERFACE = "network"
GUEST_CID = 3
_VERSION = re.compile(r"v?(\d+)\.(\d+)\.(\d+)")
_MOST_CPUS = 32
_REFILL_MS = 1000


@dataclass(frozen=True)
class Order:
    """One request."""

    method: Literal["GET", "PUT", "PATCH"]
    path: str
    body: Mapping[str, Any] = field(default_factory=dict)


def problem_with(version: str) -> str:
    """Why a Firecracker of this version cannot be used; empty if it can."""
    found = _VERSION.search(version)
    if found is None:
        return f"Firecracker tells no version ({version!r:.80})"
    number = int(found.group(1)), int(found.group(2))
    if not OLDEST <= number < BEFORE:
        return f"Firecracker {found.group(0)} is not supported: {_dotted(OLDEST)} or newer, below {_dotted(BEFORE)}"
    return ""


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def boot_orders(shape: Shape, command_line: str) -> tuple[Order, ...]:
    """From a fresh process to a running VM."""
    cpus = min(shape.cpus, _MOST_CPUS)
    if cpus > 1:
        cpus -= cpus % 2  # one or an even number
    machine = {"vcpu_count": cpus, "mem_size_mib": shape.memory_bytes >> 20, "track_dirty_pages": True}
    # Without a keyboard controller's reset a reboot would not end the process; PCI it has not.
    arguments = f"{command_line} reboot=k pci=off"
    source = {"kernel_image_path": KERNEL, "initrd_path": INITRD, "boot_args": arguments}
    network = (_interface(),) if shape.network else ()
    return (
        Order("PUT", "/machine-config", machine),
        Order("PUT", "/boot-source", source),
        _drive(ROOT, read_only=True),
        _drive(DISK, read_only=False),
        *network,
        Order("PUT", "/vsock", {"guest_cid": GUEST_CID, "uds_path": VSOCK}),
        Order("PUT", "/entropy", {}),
        Order("PUT", "/actions", {"action_type": "InstanceStart"}),
    )


def _drive(name: str, *, read_only: bool) -> Order:
    body = {"drive_id": name, "path_on_host": name, "is_root_device": False, "is_read_only": read_only}
    return Order("PUT", f"/drives/{name}", body)


def _interface() -> Order:
    body = {"iface_id": INTERFACE, "host_dev_name": tap.NAME, "guest_mac": MAC}
    return Order("PUT", f"/network-interfaces/{INTERFACE}", body)


def load_order() -> Order:
    """From a fresh process to a VM that stands still; its memory is the file, mapped privately.

    Its network interface is on the tap of the same name in the process's own network namespace.
    """
    backend = {"backend_type": "File", "backend_path": MEMORY}
    body = {"snapshot_path": DEVICES, "mem_backend": backend, "enable_diff_snapshots": True, "resume_vm": False}
    return Order("PUT", "/snapshot/load", body)


def save_order() -> Order:
    """Of a VM that stands still: device state, and the memory that changed since it was saved last, or was booted."""
    return Order(
        "PUT", "/snapshot/create", {"snapshot_type": "Diff", "snapshot_path": DEVICES, "mem_file_path": CHANGES}
    )


def state_order(state: Literal["Paused", "Resumed"]) -> Order:
    return Order("PATCH", "/vm", {"state": state})


def rate_order(rate: DiskRate) -> Order:
    """The rate of the disk of a VM that was booted or loaded; what was saved has the rate that it was saved with."""
    buckets = {"bandwidth": rate.bytes_per_s, "ops": rate.operations_per_s}
    # A bucket of nothing is no limit.
    limiter = {name: {"size": size, "refill_time": _REFILL_MS if size else 0} for name, size in buckets.items()}
    return Order("PATCH", f"/drives/{DISK}", {"drive_id": DISK, "rate_limiter": limiter})


def firecracker_command(binary: str, vm_id: str) -> list[str]:
    """Firecracker itself, in the VM's directory."""
    return [binary, "--api-sock", API_SOCKET, "--id", vm_id, "--level", "Warning"]


def jailer_command(jailer: str, binary: str, vm_id: str, base: Path, user_id: int) -> list[str]:
    """Firecracker with `jail_root` as its whole file system, and as another user."""
    command = [jailer, "--id", vm_id, "--exec-file", binary, "--uid", str(user_id), "--gid", str(user_id)]
    command += ["--chroot-base-dir", str(base), "--"]
    return [*command, "--api-sock", API_SOCKET, "--level", "Warning"]


def guarded(command: list[str], *, network: bool = True) -> list[str]:
    """`command`, so that it ends with whoever starts it, also if it changes its user, and in namespaces of its own.

    Args: network: False where it is in one of its own already.
    A process that changes its user does not hear of its parent's death any more.  The two above it do: the upper one
    dies with its parent, the lower one with that, and as the first of a PID namespace it takes along all in there.
    """
    upper = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "--",
        "unshare",
        *(("--net",) if network else ()),
        "--ipc",
        "--pid",
        "--fork",
        "--kill-child=KILL",
    ]
    lower = ["sh", "-c", '"$@" & exec >/dev/null 2>&1; wait $!', "vmm"]
    return [*upper, "--", *lower, *command]


def jail_root(base: Path, binary: str, vm_id: str) -> Path:
    """The directory that the jailer makes the root of a VM's process."""
    return base / Path(binary).name / vm_id / "root"
