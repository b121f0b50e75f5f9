"""Imports a template's modules before its machines are made, in a process that is worth little to who wrote them.

A package that is imported runs its own code, and what imports it for all machines must be the process that forks
them.  So the zygote splits: a child without privileges, on the stage, without a network, imports and forks.  Its
parent imports nothing and keeps the one privilege that this needs: to write the id maps of new user namespaces.
"""

from __future__ import annotations

import gc
import importlib
import os
import socket
import sys
from typing import List, NoReturn, Optional, Tuple

from podflare.guest import syscalls as sc
from podflare.guest.descriptors import close_all_but
from podflare.guest.process import stage
from podflare.wire.plan import IdMap, StagePlan

MAX_MESSAGE_BYTES = 4096


class PreloadFailed(Exception):
    """A module of the template cannot be imported."""


class Mapper:
    """In the child: the parent's privilege, at a distance."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line

    def write_id_maps(self, pid: int, ids: IdMap) -> None:
        """As stage.write_id_maps; which ids, the parent knows itself.  Raises: OSError."""
        self.ask(f"map {pid}")

    def ask(self, request: str) -> None:
        """Have one thing done.  Raises: OSError that says why it was not."""
        self._line.send(request.encode()[:MAX_MESSAGE_BYTES])
        answer = self._line.recv(MAX_MESSAGE_BYTES).decode("utf-8", "replace")
        if answer != "ok":
            raise OSError(answer or "the parent of the zygote ended")


def split(plan: StagePlan) -> Tuple[Optional[Mapper], str]:
    """Import the modules of the plan in a new process, which returns its mapper; this one serves it, and ends with it.

    Where that process could make no machines (a kernel that lets only root make user namespaces), it ends, and this
    one returns (None, why) with nothing imported.
    Precondition: on the stage, with one thread.
    Raises: PreloadFailed, in the new process.
    """
    sc.unshare(sc.CLONE_NEWNET | sc.CLONE_NEWIPC)
    mounts = stage.show_root(plan)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    child = os.fork()
    if child == 0:
        ours.close()
        mapper = Mapper(theirs)
        _give_up_privileges(plan)
        try:
            _try_namespace(plan, mapper)
        except OSError as exc:
            mapper.ask(f"unable {exc}")
            os._exit(0)
        mapper.ask("able")
        _import_all(plan)
        mapper.ask("imported")
        return mapper, ""
    theirs.close()
    why = _serve(plan, ours, mounts, child)
    ours.close()
    os.waitpid(child, 0)
    stage.hide_root(mounts)
    return None, why


def _give_up_privileges(plan: StagePlan) -> None:
    if plan.own_user_namespace:
        sc.set_capabilities()
    else:
        # Neither an account of the computer nor an id of a machine.
        nobody = plan.ids.first + plan.ids.count
        os.setgroups([])
        os.setresgid(nobody, nobody, nobody)
        os.setresuid(nobody, nobody, nobody)  # capabilities(7): from 0 to others, all sets are emptied
    sc.set_no_new_privs()


def _try_namespace(plan: StagePlan, mapper: Mapper) -> None:
    """Do once what each family begins with.  Raises: OSError that says what this kernel does not allow."""
    unshared_r, unshared_w = os.pipe2(os.O_CLOEXEC)
    mapped_r, mapped_w = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        try:
            os.close(mapped_w)
            sc.unshare(sc.CLONE_NEWUSER)
            os.write(unshared_w, b".")
            os.read(mapped_r, 1)
            os.setresuid(0, 0, 0)
            sc.unshare(sc.CLONE_NEWPID | sc.CLONE_NEWNS)
            os.write(unshared_w, b"+")
        except BaseException as exc:
            os.write(unshared_w, str(exc).encode()[:MAX_MESSAGE_BYTES])
        finally:
            os._exit(0)
    try:
        os.close(unshared_w)
        said = os.read(unshared_r, MAX_MESSAGE_BYTES)
        if said == b".":
            mapper.write_id_maps(child, plan.ids)
            os.write(mapped_w, b".")
            said = os.read(unshared_r, MAX_MESSAGE_BYTES)
        if said != b"+":
            raise OSError(said.decode("utf-8", "replace") or "a new user namespace could not be made")
    finally:
        for fd in (unshared_r, mapped_r, mapped_w):
            os.close(fd)
        os.waitpid(child, 0)


def _import_all(plan: StagePlan) -> None:
    before = list(sys.path)
    sys.path += plan.paths
    # What packages say while they are imported is for nobody, and the daemon reads our stderr only at our end.
    stderr = os.dup(2)
    os.dup2(1, 2)
    try:
        for name in plan.preload:
            try:
                importlib.import_module(name)
            except BaseException as exc:
                raise PreloadFailed(f"{name} cannot be imported: {type(exc).__name__}: {exc}") from exc
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        sys.path[:] = before
    gc.collect()


def _serve(plan: StagePlan, line: socket.socket, mounts: List[str], child: int) -> str:
    """Parent: do what the child asks for, then end with its status.  Returns why the child is of no use, if it says so.

    That the child may name any process costs nothing: the kernel lets a map be written once, by the parent
    namespace, and with these ids nobody outside can be meant.
    """
    while True:
        word, _, detail = line.recv(MAX_MESSAGE_BYTES).decode("utf-8", "replace").partition(" ")
        try:
            if word == "map":
                stage.write_id_maps(int(detail), plan.ids)
            elif word == "able":
                # Only the child speaks with the daemon: a copy here would hide its end.
                close_all_but({0, 1, 2, line.fileno()})
            elif word == "imported":
                stage.hide_root(mounts)
                mounts = []
            elif word == "unable":
                line.send(b"ok")
                return detail
            else:
                _end_with(child)
            line.send(b"ok")
        except (OSError, ValueError) as exc:
            line.send(f"{type(exc).__name__}: {exc}".encode()[:MAX_MESSAGE_BYTES])


def _end_with(child: int) -> NoReturn:
    _, status = os.waitpid(child, 0)
    os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1)
