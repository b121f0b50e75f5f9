"""What the first process does to its virtual machine: loopback, clock, entropy, names, its end.

Needs root of the machine.  Raises OSError that names the step.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
import uuid

OWN_FOLDER = "/run/podflare"
"""Read-only, made by the initramfs: this code."""
EMPTY = f"{OWN_FOLDER}/empty"

_NO_FILES = (b"/dev/", b"/memfd:", b"/SYSV", b"[", b"anon_inode:")
SLOW_NS = 1_000_000
AHEAD_NS = 5_000_000_000
_RNDADDENTROPY = 0x40085203
_RNDRESEEDCRNG = 0x5207
_SIOCSIFFLAGS = 0x8914
_IFF_UP_RUNNING = 0x1 | 0x40


def raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP_RUNNING))


def set_names(hostname: str, machine_id: str) -> None:
    """Host name and machine id; empty: a new one."""
    if hostname:
        socket.sethostname(hostname)
    data = f"{machine_id or uuid.uuid4().hex}\n".encode()
    # Over what is there: to empty a file and fill it anew takes the file system's code several times as long.
    fd = os.open("/etc/machine-id", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if os.fstat(fd).st_size != len(data):
            os.ftruncate(fd, 0)
        os.pwrite(fd, data, 0)
    finally:
        os.close(fd)


def set_clock(unix_ns: int) -> None:
    time.clock_settime_ns(time.CLOCK_REALTIME, unix_ns)


def correct_clock(unix_ns: int) -> None:
    """Set the clock if it is slow.  One that is a little ahead stays: the order may have been under way for so long."""
    ahead_ns = time.time_ns() - unix_ns
    if not -SLOW_NS <= ahead_ns <= AHEAD_NS:
        set_clock(unix_ns)


def files_are_mapped() -> bool:
    """Whether a process may be writing to a file through its memory: that need not change the file's times."""
    for name in os.listdir("/proc"):
        try:
            with open(f"/proc/{name}/maps", "rb") if name.isdigit() else open(os.devnull, "rb") as maps:
                for line in maps:
                    fields = line.split(None, 5)
                    if fields[1][1:4:2] == b"ws" and len(fields) > 5 and not fields[5].startswith(_NO_FILES):
                        return True
        except (OSError, IndexError):
            continue  # it has ended meanwhile
    return False


def add_entropy(seed: bytes) -> None:
    """From now on /dev/urandom and getrandom(2) differ from those of every other copy of this machine."""
    fd = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _RNDADDENTROPY, struct.pack("ii", len(seed) * 8, len(seed)) + seed)
        fcntl.ioctl(fd, _RNDRESEEDCRNG)
    finally:
        os.close(fd)


def stop() -> None:
    """Reboot at once, which every hypervisor is told to take for the end.  Nothing is written back: disks are the
    machine's own and go with it."""
    with open("/proc/sysrq-trigger", "w") as file:
        file.write("b")
