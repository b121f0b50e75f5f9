"""The family: first process of a sandbox's own user and PID namespace, ancestor of everything in it.

Owns the namespaces: when it ends, for whatever reason, the kernel ends every process below it (pid_namespaces(7)).
It runs no user code and reads nothing that user code wrote.  Its one duty after the agent runs: end when the
daemon does (end of file on the control socket), and say how the agent ended.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
from typing import Dict, NoReturn

from podflare.guest import agent
from podflare.guest import syscalls as sc
from podflare.guest.process import confine
from podflare.wire.plan import MachinePlan, StagePlan

_NAMESPACES = sc.CLONE_NEWNS | sc.CLONE_NEWPID | sc.CLONE_NEWNET | sc.CLONE_NEWIPC | sc.CLONE_NEWUTS
"""The cgroup namespace comes last: its root is the group in which its maker is at that moment."""


class Fds:
    """The descriptors that a machine is born with, in the order in which the zygote got them."""

    def __init__(self, fds: "list[int]") -> None:
        self.channel, self.control, self.birth = fds[:3]
        self.cgroups = fds[3:]

    def all(self) -> "set[int]":
        return {self.channel, self.control, self.birth, *self.cgroups}


def run_family(stage: StagePlan, plan: MachinePlan, fds: Fds) -> NoReturn:
    """Main of the family process, pid 1 of its namespace."""
    try:
        status = _live(stage, plan, fds)
    except BaseException as exc:
        _tell(fds.birth, {"error": f"family: {exc}"})
        status = 1
    os._exit(status)


def _live(stage: StagePlan, plan: MachinePlan, fds: Fds) -> int:
    close_other_fds(fds.all())
    wake_r, wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    helper = os.fork()
    if helper == 0:
        _run_helper(stage, plan, fds)
    for fd in (fds.channel, fds.birth, *fds.cgroups):
        os.close(fd)
    control = socket.socket(fileno=fds.control)
    control.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(wake_r, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            # Nothing is ever sent to the family: a readable control socket means that the daemon is gone.
            if control in ready:
                return 0
            _drain(wake_r)
            ended = _reap()
            ended.pop(helper, None)
            if ended:  # the helper exits at once, so any other child is the agent
                _tell(control.fileno(), {"agent_status": next(iter(ended.values()))})
                return 0


def _run_helper(stage: StagePlan, plan: MachinePlan, fds: Fds) -> NoReturn:
    """A process just to make new namespaces, and the agent in them: a PID namespace applies to children only.

    Joining a control group can wait many milliseconds for the kernel (cgroup_threadgroup_rwsem), so this process
    moves the agent while the agent mounts its root.
    """
    try:
        placed_r, placed_w = os.pipe2(os.O_CLOEXEC)
        sc.unshare(_NAMESPACES)
        pid = os.fork()
        if pid == 0:
            os.close(placed_w)
            _run_agent(stage, plan, fds, placed_r)
        for fd in fds.cgroups:
            os.write(fd, str(pid).encode())  # permission was checked when the daemon opened the file
        os.write(placed_w, b".")
        os._exit(0)
    except BaseException as exc:
        _tell(fds.birth, {"error": f"new namespaces: {exc}"})
        os._exit(1)


def _run_agent(stage: StagePlan, plan: MachinePlan, fds: Fds, placed: int) -> NoReturn:
    """Pid 1 of the sandbox: confine itself, let the daemon look at the result, then serve."""
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        os.umask(0o022)
        close_other_fds({fds.channel, fds.birth, placed})
        confine.enter_root(stage, plan)
        confine.set_identity(plan)
        if os.read(placed, 1) != b".":
            raise OSError("the control groups could not be joined")
        os.close(placed)
        sc.unshare(sc.CLONE_NEWCGROUP)
        confine.give_up_privileges(plan)
        # The daemon checks namespaces, capabilities and filter from outside before it lets the agent go on.
        with socket.socket(fileno=fds.birth) as birth:
            birth.send(json.dumps({"confined": True}).encode())
            if birth.recv(16) != b"go":
                os._exit(1)
    except BaseException as exc:
        _tell(fds.birth, {"error": f"confinement: {exc}"})
        os._exit(1)
    # User code has the agent's user id; only this keeps it away from the agent's memory (ptrace(2), access checks).
    sc.set_dumpable(False)

    def before_repl() -> None:
        sc.set_dumpable(True)  # /proc/self and /dev/fd are the REPL's own
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")  # out of memory: the REPL goes before the agent
        for kind, limit in plan.repl_rlimits:
            confine.lower_rlimit(kind, limit)

    agent.run(socket.socket(fileno=fds.channel), home=plan.home, before_repl=before_repl)


def close_other_fds(keep: "set[int]") -> None:
    """Close every descriptor above 2 but `keep`.  Needs a /proc."""
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd not in keep:
            try:
                os.close(fd)
            except OSError:
                pass  # the descriptor of the listing itself


def _reap() -> "Dict[int, int]":
    ended: Dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = status


def _drain(fd: int) -> None:
    try:
        while os.read(fd, 512):
            pass
    except BlockingIOError:
        pass


def _tell(fd: int, message: "Dict[str, object]") -> None:
    try:
        os.write(fd, json.dumps(message).encode()[:8192])
    except OSError:
        pass  # the daemon went away; the exit that follows says the same
