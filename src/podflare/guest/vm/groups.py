"""The control group of everything in the machine but its first process: its limits, and what it uses.

A limit of memory below the machine's own makes the kernel end the REPL and not the machine.
"""

from __future__ import annotations

import errno
import os
import time
from typing import Dict

from podflare.guest import syscalls as sc

_ROOT = "/sys/fs/cgroup"
_GROUP = f"{_ROOT}/sandbox"
_FREEZE_TIMEOUT_S = 5.0
_FREEZE_LOOK_S = 0.001


def make() -> None:
    """Mount control groups and make the one.  Raises: OSError."""
    sc.mount("cgroup", _ROOT, "cgroup2", sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC)
    _write(f"{_ROOT}/cgroup.subtree_control", "+memory +pids")
    os.mkdir(_GROUP)


def join() -> None:
    """Put the calling process into it."""
    _write(f"{_GROUP}/cgroup.procs", "0")


def hide() -> None:
    """In the agent's own mount namespace: user code must not change its limits."""
    sc.umount(_ROOT, sc.MNT_DETACH)


def limit(memory_bytes: int, processes: int) -> None:
    _write(f"{_GROUP}/memory.max", str(memory_bytes))
    _write(f"{_GROUP}/pids.max", str(processes))


def freeze() -> None:
    """Nothing in it runs on from now.  Raises: OSError if it still does after a while."""
    _write(f"{_GROUP}/cgroup.freeze", "1")
    ends_s = time.monotonic() + _FREEZE_TIMEOUT_S
    while True:
        with open(f"{_GROUP}/cgroup.events") as events:
            if "frozen 1" in events.read():
                return
        if time.monotonic() > ends_s:
            raise OSError(errno.EBUSY, "processes of the sandbox run on although they were stopped")
        time.sleep(_FREEZE_LOOK_S)


def usage() -> Dict[str, int]:
    with open(f"{_GROUP}/memory.events") as events:
        kills = next((int(line.split()[1]) for line in events if line.startswith("oom_kill ")), 0)
    return {
        "memory_bytes": _number(f"{_GROUP}/memory.current"),
        "processes": _number(f"{_GROUP}/pids.current"),
        "oom_kills": kills,
    }


def _write(path: str, value: str) -> None:
    # By system calls alone: where there is no KVM, whatever a new machine does first is translated anew.
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def _number(path: str) -> int:
    with open(path) as file:
        return int(file.read())
