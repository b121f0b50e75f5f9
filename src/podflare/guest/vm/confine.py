"""From the first process to a confined agent: the order of the steps is the design.

The wall around a virtual machine is the hypervisor.  What is done here only makes a machine look the same in both
engines, and keeps user code from harming its own machine by accident: a PID namespace with the agent as process 1,
no capabilities, a /dev without the machine's disks and ports.
"""

from __future__ import annotations

import os
import resource
import socket
import stat
import sys
from typing import NoReturn

from podflare.guest import syscalls as sc
from podflare.guest.descriptors import close_all_but
from podflare.guest.link import Descriptor
from podflare.guest.process.confine import mount_proc
from podflare.guest.vm import groups, template
from podflare.guest.vm.system import EMPTY

HOME = "/root"
_AGENT_OPEN_FILES = 16384
_USER_OPEN_FILES = 4096
_NODES = (("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0))
_LINKS = (
    ("ptmx", "pts/ptmx"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
)


def start_agent(channel: Descriptor, line: socket.socket) -> None:
    """Start the agent, which serves the host at the other end of `channel` and ends with it.

    Args: line: the agent's end of its line to the first process (guest.supervision).

    Raises: OSError if it could not be started.
    """
    pid = os.fork()
    if pid == 0:
        _become_parent_of_agent(channel, line)
    _, status = os.waitpid(pid, 0)
    if status != 0:
        raise OSError(f"the agent could not be started (status {status:#x}); the console says why")


def _become_parent_of_agent(channel: Descriptor, line: socket.socket) -> NoReturn:
    """Only children of a caller of unshare(2) are in the new PID namespace."""
    status = 1
    try:
        os.setsid()
        groups.join()
        sc.unshare(sc.CLONE_NEWNS | sc.CLONE_NEWPID)
        if os.fork() == 0:
            _become_agent(channel, line)
        status = 0
    except BaseException as exc:  # noqa: BLE001  # a forked copy of process 1 must not return into it
        sys.stderr.write(f"podflare: the agent could not be started: {exc}\n")
    finally:
        os._exit(status)


def _become_agent(channel: Descriptor, line: socket.socket) -> NoReturn:
    from podflare.guest import agent  # the first process itself has no use for it

    try:
        close_all_but({0, 1, 2, channel.fileno(), line.fileno()})
        # Mounts from here on are the agent's alone.
        sc.mount(None, "/", None, sc.MS_REC | sc.MS_PRIVATE)
        groups.hide()
        mount_proc("/proc", EMPTY)
        _make_dev()
        os.dup2(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), 0)
        os.chdir(HOME)
        template.prepare()
        resource.setrlimit(resource.RLIMIT_NOFILE, (_AGENT_OPEN_FILES, _AGENT_OPEN_FILES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sc.lock_secure_bits()
        sc.empty_bounding_set()
        sc.set_capabilities()
        sc.set_no_new_privs()
        # User code has the agent's user id; only this keeps it away from the agent's memory (ptrace(2)).
        sc.set_dumpable(False)
        template.preload()
        agent.run(channel, home=HOME, before_repl=_prepare_user_code, before_shell=_prepare_user_code, supervisor=line)
    except BaseException as exc:  # noqa: BLE001  # as above
        sys.stderr.write(f"podflare: the agent could not be started: {exc}\n")
    finally:
        os._exit(1)


def _prepare_user_code() -> None:
    """In a process that is about to run user code: as in the process engine."""
    sc.set_dumpable(True)  # /proc/self and /dev/fd are its own
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")  # out of memory: it goes before the agent
    resource.setrlimit(resource.RLIMIT_NOFILE, (_USER_OPEN_FILES, _USER_OPEN_FILES))


def _make_dev() -> None:
    no_special = sc.MS_NOSUID | sc.MS_NODEV
    sc.mount("dev", "/dev", "tmpfs", sc.MS_NOSUID | sc.MS_NOEXEC, "mode=755,size=64k")
    before = os.umask(0)
    for name, major, minor in _NODES:
        os.mknod(f"/dev/{name}", stat.S_IFCHR | 0o666, os.makedev(major, minor))
    os.umask(before)
    for name, target in _LINKS:
        os.symlink(target, f"/dev/{name}")
    for name in ("pts", "shm"):
        os.mkdir(f"/dev/{name}")
    sc.mount("devpts", "/dev/pts", "devpts", sc.MS_NOSUID | sc.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620")
    sc.mount("shm", "/dev/shm", "tmpfs", no_special, "mode=1777")
