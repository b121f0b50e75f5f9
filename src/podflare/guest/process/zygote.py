"""The zygote: a warm, single-threaded interpreter on its stage, that forks one family per sandbox.

Speaks with the daemon over one SOCK_SEQPACKET socket: a StagePlan first, then for each family a packet with its
control socket, answered by {"ok"} and a pidfd or {"error"}.  It ends with that socket.
User code never runs in it, so whatever it has imported is what every new machine starts with; a template's own modules
are imported in a part of it that has no privileges (preload.py).
"""

from __future__ import annotations

import gc
import json
import os
import selectors
import signal
import socket
import sys
from typing import Callable, List, NoReturn, Tuple

from podflare.guest import namespace, processes
from podflare.guest import syscalls as sc
from podflare.guest.process import confine, family, preload, stage
from podflare.wire import plan as plans

MAX_PACKET_BYTES = 192 * 1024
_OOM_SCORE = 200
"""Where a computer has no memory left, sandboxes go before the daemon.  With CAP_SYS_RESOURCE it is their least."""
WriteIdMaps = Callable[[int, plans.IdMap], None]


def main(argv: List[str]) -> NoReturn:
    """`zygote FD`: serve the daemon at the other end of the socket FD, then exit."""
    control = socket.socket(fileno=int(argv[0]))
    try:
        plan = plans.stage_from_json(control.recv(MAX_PACKET_BYTES))
        _enter(plan)
        mapper, cold = preload.split(plan) if plan.preload else (None, "")
        _settle()
    except preload.PreloadFailed as exc:
        _answer(control, {"preload": str(exc)[:4000]})
        os._exit(1)
    except BaseException as exc:
        _answer(control, {"error": f"{type(exc).__name__}: {exc}"})
        os._exit(1)
    # The daemon reads this pipe at our end only, and all machines write to it: full it must not hold them up.
    os.set_blocking(2, False)
    _answer(control, {"ok": True, "python": sys.version.split()[0], "cold": cold})
    _serve(control, plan, stage.write_id_maps if mapper is None else mapper.write_id_maps)
    os._exit(0)


def _enter(plan: plans.StagePlan) -> None:
    namespace.prepare_paths(plan.paths)
    confine.volunteer(_OOM_SCORE)
    with open(os.devnull, "w"):
        pass  # Python 3.9 imports a module for its first text file, and on the stage there is none to import from
    # After the site configuration, which may set variables for this computer.
    os.environ.clear()
    os.environ.update(plan.environment)
    if plan.own_user_namespace:
        stage.become_namespace_root()
    stage.enter_stage(plan)


def _settle() -> None:
    sc.set_child_subreaper()  # families outlive the process that forks them, and must be reaped here
    gc.collect()
    gc.freeze()  # the collector of a child would otherwise touch, and so copy, every page of ours


def _serve(control: socket.socket, plan: plans.StagePlan, write_id_maps: WriteIdMaps) -> None:
    wake_r, wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(wake_r, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is control:
                    data, fds, _, _ = socket.recv_fds(control, MAX_PACKET_BYTES, 1)
                    if not data:
                        return
                    _handle(control, plan, fds, write_id_maps)
                else:
                    os.read(wake_r, 512)
                    processes.reap()


def _handle(control: socket.socket, plan: plans.StagePlan, fds: List[int], write_id_maps: WriteIdMaps) -> None:
    try:
        pid = _start_family(plan, fds[0], write_id_maps)
        # Opened before the family can be reaped (only _serve does), so it cannot be another process.
        pidfd = os.pidfd_open(pid)
        try:
            socket.send_fds(control, [json.dumps({"ok": True, "pid": pid}).encode()], [pidfd])
        finally:
            os.close(pidfd)
    except (OSError, ValueError, TypeError, KeyError) as exc:
        _answer(control, {"error": f"{type(exc).__name__}: {exc}"})
    finally:
        for fd in fds:
            os.close(fd)


def _start_family(plan: plans.StagePlan, family_control: int, write_id_maps: WriteIdMaps) -> int:
    """Pid of a new family, which already runs.

    A middle process makes the namespaces and forks the family into them; the id maps are written from outside of its
    user namespace.
    """
    to_parent_r, to_parent_w = os.pipe2(os.O_CLOEXEC)
    to_child_r, to_child_w = os.pipe2(os.O_CLOEXEC)
    middle = os.fork()
    if middle == 0:
        # Held open here they would hide each other's end.
        os.close(to_parent_r)
        os.close(to_child_w)
        _run_middle(plan, family_control, to_child_r, to_parent_w)
    try:
        os.close(to_parent_w)
        os.close(to_child_r)
        step, _ = _receive(to_parent_r)
        if step == "unshared":
            write_id_maps(middle, plan.ids)
            os.write(to_child_w, b".")
            step, detail = _receive(to_parent_r)
            if step == "family":
                return int(detail)
        raise OSError(f"new user namespace: {step or 'the process died'}")
    finally:
        os.close(to_parent_r)
        os.close(to_child_w)
        os.waitpid(middle, 0)


def _receive(fd: int) -> Tuple[str, str]:
    word, _, detail = os.read(fd, 4096).decode("utf-8", "replace").partition(" ")
    return (word, detail) if word in ("unshared", "family") else (f"{word} {detail}".strip(), "")


def _run_middle(plan: plans.StagePlan, family_control: int, from_parent: int, to_parent: int) -> NoReturn:
    try:
        signal.set_wakeup_fd(-1)
        sc.unshare(sc.CLONE_NEWUSER)
        os.write(to_parent, b"unshared")
        if os.read(from_parent, 1) != b".":
            os._exit(1)
        os.setresgid(0, 0, 0)
        if not plan.own_user_namespace:
            os.setgroups([])  # an ordinary user's namespace has this denied, for its own groups must not be dropped
        os.setresuid(0, 0, 0)
        sc.unshare(sc.CLONE_NEWPID)
        pid = os.fork()
        if pid == 0:
            family.run_family(plan, family_control)
        os.write(to_parent, f"family {pid}".encode())
        os._exit(0)
    except BaseException as exc:
        os.write(to_parent, f"{type(exc).__name__}: {exc}".encode()[:4000])
        os._exit(1)


def _answer(control: socket.socket, body: "dict[str, object]") -> None:
    try:
        control.send(json.dumps(body).encode()[:MAX_PACKET_BYTES])
    except OSError:
        pass  # the daemon is gone; the caller ends next
