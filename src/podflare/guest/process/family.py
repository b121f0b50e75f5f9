"""The family: first process of a sandbox's own user and PID namespace, ancestor of it and of all its forks.

Owns the namespaces: when it ends, for whatever reason, the kernel ends every process below it (pid_namespaces(7)).
It runs no user code and reads nothing that user code wrote.  It makes machines as the daemon orders, over a
SOCK_SEQPACKET socket: {"plans": [...], "nested": bool, "carried": bool} with, if nested, a descriptor of the PID
namespace below which the machines are to be, if carried, a socket to the carrier (carry.py), and then for each plan its
birth descriptors.  It ends with that socket.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
from typing import Any, Callable, Dict, List, NoReturn, Optional

from podflare.guest import agent, processes
from podflare.guest import syscalls as sc
from podflare.guest.descriptors import close_all_but
from podflare.guest.process import confine, uplink
from podflare.guest.process.capture import capture_layers, is_small, small_room
from podflare.guest.process.carry import run_carrier
from podflare.guest.process.comparison import answer_comparison
from podflare.guest.process.merging import answer_merge
from podflare.guest.process.room import Outgrown, Room
from podflare.guest.process.signals import Warden
from podflare.guest.process.transplant import empty
from podflare.wire.plan import MachinePlan, StagePlan, machine_from_dict

MAX_ORDER_BYTES = 160 * 1024
MAX_ORDER_FDS = 253
"""SCM_MAX_FD, unix(7)."""

_NAMESPACES = sc.CLONE_NEWNS | sc.CLONE_NEWNET | sc.CLONE_NEWIPC | sc.CLONE_NEWUTS
"""What the agent makes for itself.  Its PID namespace must be made by its parent, and the cgroup namespace comes
last: its root is the group in which its maker is at that moment."""
_OWN_NAMESPACES = ("pid", "cgroup", "ipc", "uts", "net", "mnt")
"""In the order of guest.branch.ChildFds."""


class Birth:
    """What one machine is born with: its plan and descriptors, in the order of the daemon's packet."""

    def __init__(self, plan: MachinePlan, fds: List[int]) -> None:
        self.plan = plan
        self.channel, self.birth, self.line = fds[:3]
        self.cgroups = fds[3:]

    def fds(self) -> List[int]:
        return [self.channel, self.birth, self.line, *self.cgroups]


def run_family(stage: StagePlan, control_fd: int) -> NoReturn:
    """Main of the family process, pid 1 of its namespace."""
    try:
        close_all_but({0, 1, 2, control_fd})
        _serve(stage, socket.socket(fileno=control_fd))
    finally:
        os._exit(0)


def _serve(stage: StagePlan, control: socket.socket) -> None:
    own_pid_ns = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    wake_r, wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    warden = Warden()
    listeners, to_warden = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with selectors.DefaultSelector() as selector:
        for source in (control, wake_r, listeners):
            selector.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj == wake_r:
                    os.read(wake_r, 512)
                    processes.reap()
                elif key.fileobj is listeners:
                    _, (fd,), _, _ = socket.recv_fds(listeners, 1, 1)
                    warden.listeners.add(fd)
                    selector.register(fd, selectors.EVENT_READ)
                elif key.fileobj is not control:
                    if not warden.serve(key.fd):
                        selector.unregister(key.fd)
                else:
                    data, fds, _, _ = socket.recv_fds(control, MAX_ORDER_BYTES, MAX_ORDER_FDS)
                    if not data:
                        return  # the daemon is gone
                    try:
                        _obey(stage, control, json.loads(data), fds, own_pid_ns, warden, to_warden.fileno())
                    finally:
                        for fd in fds:
                            os.close(fd)


def _obey(
    stage: StagePlan,
    control: socket.socket,
    order: Dict[str, Any],
    fds: List[int],
    own_pid_ns: int,
    warden: Warden,
    to_warden: int,
) -> None:
    if "capture" in order:
        _capture(control, order)
    elif "carry" in order:
        _carry(order["carry"], fds)
    elif "compare" in order:
        _compare(stage, order["compare"], fds[0])
    elif "merge" in order:
        _merge(stage, order["merge"], fds)
    else:
        if order["nested"]:
            warden.machines_are_nested()
        _make_machines(stage, order, fds, own_pid_ns, to_warden)


def _capture(control: socket.socket, order: Dict[str, Any]) -> None:
    """Here if there is little to copy; else in a process of its own: the family must hear when the daemon goes."""
    source, target = f"/machines/{order['capture']}", f"/machines/{order['to']}"
    answer: Dict[str, Any] = {"captured": order["to"], "error": None}
    try:
        if not order["merged"] and is_small(source):
            capture_layers(source, target, small_room())
            _tell(control.fileno(), answer)
            return
    except Outgrown:
        empty(target)  # code that runs in it made more of it meanwhile
    except OSError as exc:
        _tell(control.fileno(), {**answer, "error": f"{type(exc).__name__}: {exc}"})
        return
    if os.fork() == 0:
        try:
            _capture_apart(source, target, order)
        except BaseException as exc:
            answer["error"] = str(exc) if isinstance(exc, Outgrown) else f"{type(exc).__name__}: {exc}"
        finally:
            _tell(control.fileno(), answer)
            os._exit(0)


def _capture_apart(source: str, target: str, order: Dict[str, Any]) -> None:
    """In a process of its own: it dies when its time is over."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, order["timeout_s"])
    merged = [f"/machines/{layer}" for layer in order["merged"]]
    capture_layers(source, target, Room(order["entries"], order["bytes"]), merged)


def _compare(stage: StagePlan, order: Dict[str, Any], answer_to: int) -> None:
    """In a process of its own, too, which answers on a socket of its own: several may run."""
    if os.fork() == 0:
        try:
            answer_comparison(stage, order, answer_to)
        finally:
            os._exit(0)


def _merge(stage: StagePlan, order: Dict[str, Any], fds: List[int]) -> None:
    """Likewise; it goes on to talk with the daemon on its socket, and joins the machine whose files it changes."""
    if os.fork() == 0:
        try:
            answer_merge(stage, order, fds)
        finally:
            os._exit(0)


def _carry(order: Dict[str, Any], fds: List[int]) -> None:
    """In a process of its own, too: it takes as long as there is memory."""
    if os.fork() == 0:
        try:
            close_all_but({0, 1, 2, *fds})
            source, target, answer = fds
            run_carrier(source, target, answer, order["timeout_s"])
        finally:
            os._exit(0)


def _make_machines(stage: StagePlan, order: Dict[str, Any], fds: List[int], own_pid_ns: int, to_warden: int) -> None:
    plans = [machine_from_dict(body) for body in order["plans"]]
    nested: Optional[int] = None
    carrier: Optional[int] = None
    if order["nested"]:
        nested, fds = fds[0], fds[1:]
    elif order["carried"]:
        carrier, fds = fds[0], fds[1:]
    each = len(fds) // len(plans)
    births = [Birth(plan, fds[i * each : (i + 1) * each]) for i, plan in enumerate(plans)]
    try:
        if nested is None:
            _make_agents(stage, births, own_pid_ns, to_warden, adopts=False, carrier=carrier)
            return
        # Machines below another one are made by a process in that one's PID namespace.
        sc.setns(nested, sc.CLONE_NEWPID)
        if os.fork() == 0:
            _run_nested(stage, births, to_warden)
    except OSError as exc:
        _tell_all(births, exc)
    finally:
        sc.setns(own_pid_ns, sc.CLONE_NEWPID)


def _run_nested(stage: StagePlan, births: List[Birth], to_warden: int) -> NoReturn:
    try:
        signal.set_wakeup_fd(-1)
        own_pid_ns = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        _make_agents(stage, births, own_pid_ns, to_warden, adopts=True)
    except BaseException as exc:
        _tell_all(births, exc)
    os._exit(0)


def _make_agents(
    stage: StagePlan,
    births: List[Birth],
    own_pid_ns: int,
    to_warden: int,
    *,
    adopts: bool,
    carrier: Optional[int] = None,
) -> None:
    """Fork an agent into a new PID namespace for each birth; the caller's own stays as it is.

    Joining a control group can wait many milliseconds for the kernel (cgroup_threadgroup_rwsem), so this process
    moves the agents while they mount their roots.
    """
    placed = []
    for birth in births:
        # A process whose children already go elsewhere cannot make another PID namespace.
        sc.setns(own_pid_ns, sc.CLONE_NEWPID)
        sc.unshare(sc.CLONE_NEWPID)
        placed_r, placed_w = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            _run_agent(stage, birth, placed_r, to_warden, adopts=adopts, carrier=carrier)
        os.close(placed_r)
        placed.append((birth, pid, placed_w))
    for birth, pid, placed_w in placed:
        try:
            for fd in birth.cgroups:
                os.write(fd, str(pid).encode())  # permission was checked when the daemon opened the file
            os.write(placed_w, b".")
        except OSError as exc:
            _tell(birth.birth, {"error": f"control group: {exc}"})
        finally:
            os.close(placed_w)


def _tell_all(births: List[Birth], exc: BaseException) -> None:
    for birth in births:
        _tell(birth.birth, {"error": f"new namespaces: {exc}"})


def _run_agent(
    stage: StagePlan, birth: Birth, placed: int, to_warden: int, *, adopts: bool, carrier: Optional[int]
) -> NoReturn:
    """Pid 1 of the sandbox: confine itself, let the daemon look at the result, then serve."""
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        os.umask(0o022)
        keep = {0, 1, 2, birth.channel, birth.birth, birth.line, placed, to_warden}
        close_all_but(keep if carrier is None else keep | {carrier})
        sc.unshare(_NAMESPACES)
        # The layers below may still be on their way: the daemon says when they are there.
        if os.read(birth.birth, 16) != b"mount":
            os._exit(1)
        namespaces = _own_namespaces() if adopts else []
        way_out = uplink.open_interface(birth.plan)
        confine.enter_root(stage, birth.plan)
        confine.set_identity(birth.plan)
        way_out += uplink.bring_up(birth.plan)
        if os.read(placed, 1) != b".":
            raise OSError("the control groups could not be joined")
        os.close(placed)
        sc.unshare(sc.CLONE_NEWCGROUP)
        if adopts:
            namespaces.insert(1, os.open("/proc/self/ns/cgroup", os.O_RDONLY | os.O_CLOEXEC))
        listener = confine.give_up_privileges(birth.plan, stage.filters)
        with socket.socket(fileno=to_warden) as sock:
            if listener is not None:
                socket.send_fds(sock, [b"."], [listener])
                os.close(listener)
        # The daemon checks namespaces, capabilities and filter from outside before it lets the agent go on.
        _report_confined(birth.birth, way_out)
        if os.read(birth.birth, 16) != b"go":
            os._exit(1)
    except BaseException as exc:
        _tell(birth.birth, {"error": f"confinement: {exc}"})
        os._exit(1)
    if not adopts:
        os.close(birth.birth)
    # User code has the agent's user id; only this keeps it away from the agent's memory (ptrace(2), access checks).
    sc.set_dumpable(False)
    agent.run(
        socket.socket(fileno=birth.channel),
        home=birth.plan.home,
        before_repl=_repl_preparation(birth.plan),
        before_shell=lambda: confine.prepare_user_code(birth.plan),
        fork_line=birth.line,
        hand_over=_handing_over(birth, namespaces) if adopts else None,
        carrier=carrier,
    )


def _report_confined(birth: int, way_out: List[int]) -> None:
    """With the descriptors of the machine's way out, of which none stays."""
    with socket.socket(fileno=os.dup(birth)) as sock:
        socket.send_fds(sock, [b'{"confined": true}'], way_out)
    for fd in way_out:
        os.close(fd)


def _own_namespaces() -> List[int]:
    """Descriptors of the namespaces of this process, but the cgroup one, which is made later."""
    names = [name for name in _OWN_NAMESPACES if name != "cgroup"]
    return [os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in names]


def _repl_preparation(plan: MachinePlan) -> Callable[[], None]:
    def before_repl() -> None:
        confine.empower_repl()
        confine.prepare_user_code(plan)

    return before_repl


def _handing_over(birth: Birth, namespaces: List[int]) -> Callable[[List[int]], None]:
    """Passes a machine's namespaces and its REPL's descriptors to the daemon, for the REPL that is to come."""

    def hand_over(fds: List[int]) -> None:
        with socket.socket(fileno=birth.birth) as sock:
            socket.send_fds(sock, [b'{"handed": true}'], [*namespaces, *fds, birth.line])
        for fd in namespaces:
            os.close(fd)

    return hand_over


def _tell(fd: int, message: Dict[str, object]) -> None:
    try:
        os.write(fd, json.dumps(message).encode()[:8192])
    except OSError:
        pass  # the daemon went away; the exit that follows says the same
