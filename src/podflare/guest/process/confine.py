"""From a fresh set of namespaces to a confined agent: the order of the steps is the design.

Runs in the future pid 1 of a machine, which is root of the machine's user namespace and nothing outside.
Each step says which privilege it still needs; the last ones give all of them away for good.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import socket
import stat
import struct
import uuid
from typing import Optional

from podflare.guest import syscalls as sc
from podflare.wire.plan import MachinePlan, StagePlan
from podflare.wire.uplink import INTERFACE

_NEW = "/new"
_NO_SPECIAL = sc.MS_NOSUID | sc.MS_NODEV
_MASKED_FILES = ("kcore", "keys", "timer_list", "sched_debug", "latency_stats", "kpagecount", "kpageflags")
_MASKED_DIRS = ("acpi", "scsi")
_READ_ONLY = ("bus", "fs", "irq", "sys", "sysrq-trigger")


# Of these the kernel has so many for the whole computer, or for the daemon's user, so nobody may have them all.
_MAX_TERMINALS = 64
_MAX_INOTIFY = 16
_MAX_SHM_FILES = 65536
_USER_CODE_OOM_SCORE = 500

REPL_CAPABILITIES = (sc.CAP_SYS_CHROOT, sc.CAP_SYS_ADMIN)
"""What setns(2) asks of a REPL that moves a fork of itself into another machine.  In the machine's user namespace
only; the filter refuses all else that they would allow, and no exec passes them on (SECBIT_NOROOT)."""


def enter_root(stage: StagePlan, plan: MachinePlan) -> None:
    """Mount the machine's root directory and make it the root.  Needs CAP_SYS_ADMIN over the mount namespace.

    Raises: OSError that names the mount; the caller exits, and its namespaces go with it.
    """
    _overlay("/skel", plan, "root", _NEW)
    for number, tree in enumerate(stage.trees):
        lower, target = f"/lower/{number}", _NEW + tree.target
        if tree.writable:
            _overlay(lower, plan, f"tree{number}", target)
        else:
            sc.mount(lower, target, None, sc.MS_BIND | sc.MS_REC)
    for path in stage.hide:
        sc.mount("/empty", _NEW + path, None, sc.MS_BIND)
    sc.mount("/dev", f"{_NEW}/dev", None, sc.MS_BIND | sc.MS_REC)
    pts_options = f"newinstance,ptmxmode=0666,mode=620,max={_MAX_TERMINALS}"
    sc.mount("devpts", f"{_NEW}/dev/pts", "devpts", sc.MS_NOSUID | sc.MS_NOEXEC, pts_options)
    sc.mount(
        "shm", f"{_NEW}/dev/shm", "tmpfs", _NO_SPECIAL, f"mode=1777,size={plan.shm_bytes},nr_inodes={_MAX_SHM_FILES}"
    )
    mount_proc(f"{_NEW}/proc", "/empty")
    os.chdir(_NEW)
    sc.pivot_root(".", ".")
    sc.umount(".", sc.MNT_DETACH)  # the stage: from here on nothing of the computer is left but the trees
    os.chdir(plan.home)


def _overlay(lower: str, plan: MachinePlan, name: str, target: str) -> None:
    """The machine's own empty layer over those it was forked with over the template's."""
    upper, work = (f"/machines/{plan.id}/{name}/{part}" for part in ("upper", "work"))
    os.makedirs(upper, 0o755)
    os.mkdir(work)
    below = [f"/machines/{layer}/{name}/upper" for layer in plan.layers]
    lowers = ":".join([path for path in below if os.path.isdir(path)] + [lower])
    # userxattr: in a user namespace overlayfs may only keep its marks in user.* attributes (kernel docs, overlayfs).
    sc.mount("overlay", target, "overlay", _NO_SPECIAL, f"lowerdir={lowers},upperdir={upper},workdir={work},userxattr")
    if below:
        # A new upper directory hides the owner and mode that the root of the layer below had.
        _copy_status(lowers.partition(":")[0], target)


def _copy_status(source: str, target: str) -> None:
    status = os.stat(source)
    os.chmod(target, stat.S_IMODE(status.st_mode))


def mount_proc(proc: str, empty: str) -> None:
    """Mount what the kernel tells of processes on `proc`, without the parts that are about the whole computer.

    Shows only the pid namespace of the caller, who must therefore be inside it already.
    Args: empty: an empty directory.
    """
    sc.mount("proc", proc, "proc", _NO_SPECIAL | sc.MS_NOEXEC)
    # Ports below 1024 are worth nothing in a network of one's own, and servers expect to bind 80.
    _set(f"{proc}/sys/net/ipv4/ip_unprivileged_port_start", "0")
    instances = f"{proc}/sys/user/max_inotify_instances"
    if os.path.exists(instances):
        _set(instances, str(_MAX_INOTIFY))
    six = f"{proc}/sys/net/ipv6/conf/{INTERFACE}/disable_ipv6"
    if os.path.exists(six):
        _set(six, "1")  # the way out, where the machine has one, is of IPv4 alone
    for name in _MASKED_FILES:
        if os.path.exists(f"{proc}/{name}"):
            sc.mount("/dev/null", f"{proc}/{name}", None, sc.MS_BIND)
    for name in _MASKED_DIRS:
        if os.path.isdir(f"{proc}/{name}"):
            sc.mount(empty, f"{proc}/{name}", None, sc.MS_BIND)
    for name in _READ_ONLY:
        path = f"{proc}/{name}"
        if os.path.exists(path):
            sc.mount(path, path, None, sc.MS_BIND)
            sc.mount(None, path, None, sc.MS_REMOUNT | sc.MS_BIND | sc.MS_RDONLY | _NO_SPECIAL | sc.MS_NOEXEC)


def _set(path: str, value: str) -> None:
    with open(path, "w") as file:
        file.write(value)


def set_identity(plan: MachinePlan) -> None:
    """Host name, machine id, loopback.  Needs CAP_SYS_ADMIN (uts) and CAP_NET_ADMIN (net) in the user namespace."""
    socket.sethostname(plan.hostname)
    with open("/etc/machine-id", "w") as file:
        file.write(uuid.uuid4().hex + "\n")
    up_and_running = 0x1 | 0x40
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        fcntl.ioctl(sock, 0x8914, struct.pack("16sH14x", b"lo", up_and_running))  # SIOCSIFFLAGS


def give_up_privileges(plan: MachinePlan, filters: "tuple[str, ...]") -> Optional[int]:
    """The last step before the agent: no effective capability, none by any exec, and only the allowed system calls.

    The agent may still give REPL_CAPABILITIES to the REPLs that it forks (`empower_repl`).
    Args:
        filters: the last one asks about signals (signals.py).
    Returns: the descriptor on which it asks; None where the kernel offers none, and that filter is not loaded.
    """
    for kind, limit in plan.rlimits:
        lower_rlimit(kind, limit)
    sc.lock_secure_bits()  # needs CAP_SETPCAP: must come before the sets are emptied
    sc.empty_bounding_set()  # likewise
    sc.set_capabilities(permitted=REPL_CAPABILITIES)
    sc.set_no_new_privs()
    for program in filters[:-1]:
        sc.load_seccomp_filter(bytes.fromhex(program))
    try:
        return sc.load_seccomp_filter(bytes.fromhex(filters[-1]), listener=True)
    except OSError as exc:
        if exc.errno not in (errno.EBUSY, errno.EINVAL):
            raise
        return None  # somebody listens for all of this computer's containers, or the kernel is old: a wall less


def empower_repl() -> None:
    """In a new REPL: what it needs to fork itself into another machine."""
    sc.set_capabilities(permitted=REPL_CAPABILITIES, effective=REPL_CAPABILITIES)


def prepare_user_code(plan: MachinePlan) -> None:
    """In a process that is about to run user code: what the agent does not share with it."""
    sc.set_dumpable(True)  # /proc/self and /dev/fd are its own
    volunteer(_USER_CODE_OOM_SCORE)
    for kind, limit in plan.repl_rlimits:
        lower_rlimit(kind, limit)


def volunteer(score: int) -> None:
    """Out of memory, this process and all below it go before what has a lower score (proc_pid_oom_score_adj(5))."""
    with open("/proc/self/oom_score_adj", "r+") as file:
        if int(file.read()) < score:
            file.seek(0)
            file.write(str(score))


def lower_rlimit(kind: int, limit: int) -> None:
    """Soft and hard limit become `limit`, or stay where they are if they already are below it."""
    _, hard = resource.getrlimit(kind)
    value = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (value, value))
