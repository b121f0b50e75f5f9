"""Three-way merge of files into a living machine: ordered from a family, whose process looks, stages, renames.

The daemon itself opens nothing that user code made.  What two machines have in common is a matter of layers
(engines/kinship.py); of a pair that was merged, one with what came over (mergebase.py).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio

from podflare.engines.base import FileConflict, FilesPlan
from podflare.engines.kinship import Kinship
from podflare.engines.linux.waiting import wait_readable
from podflare.engines.merging import failure
from podflare.engines.process.birth import Nursery, make_directory
from podflare.engines.process.layers import Layers
from podflare.engines.process.machine import ProcessMachine
from podflare.engines.process.written import TooDeep, measure
from podflare.errors import Conflict, MachineFailed, PodflareError, TooLarge
from podflare.wire.merges import MergeSide

MAX_ORDER_BYTES = 128 * 1024
"""Of an order as JSON: it is one packet."""
MAX_PLAN_BYTES = 64 * 1024 * 1024
END_TIMEOUT_S = 60.0
"""For a process that gives up a merge to undo what it did: renames."""
GRACE_S = 2.0
"""So much later than the process itself gives up, it is given up."""
WORTH_A_LOOK_BYTES = 1024 * 1024
"""Less than this may come over without a look at what the machine has written already."""


class ProcessFileMerge:
    """See engines.base.FileMerge for the contract.  Made by `begin`."""

    def __init__(
        self, nursery: Nursery, layers: Layers, kin: Kinship, ours: ProcessMachine, theirs: ProcessMachine
    ) -> None:
        self.plan = FilesPlan((), (), ())
        self._nursery = nursery
        self._layers = layers
        self._kin = kin
        self._machines = (ours, theirs)
        self._used: tuple[str, ...] = ()
        self._layer = ""
        self._sock: socket.socket | None = None
        self._bytes = self._touched = 0

    @classmethod
    async def begin(
        cls,
        nursery: Nursery,
        layers: Layers,
        kin: Kinship,
        ours: ProcessMachine,
        theirs: ProcessMachine,
        paths: tuple[str, ...],
        timeout_s: float,
    ) -> ProcessFileMerge:
        """A merge that is planned.  Raises: as engines.base.Machine.merge_files."""
        if ours.spec.template != theirs.spec.template:
            raise Conflict("the two sandboxes have different templates: nothing tells which side changed a file")
        made = cls(nursery, layers, kin, ours, theirs)
        try:
            await made._plan(paths, timeout_s)
        except BaseException:
            await made.aclose()
            raise
        return made

    async def _plan(self, paths: tuple[str, ...], timeout_s: float) -> None:
        ours, theirs = self._machines
        base, former = self._kin.base_of(ours, theirs)
        self._used = tuple(name for name in (former, *base) if name)
        self._layer = self._layers.new()
        self._layers.retain((self._layer,))
        order: dict[str, Any] = {
            "base": self._used,
            "ours": [ours.id, *ours.parts.layers],
            "theirs": [theirs.id, *theirs.parts.layers],
            "paths": paths,
            "timeout_s": timeout_s,
            "former": former,
            "layer": self._layer,
        }
        if len(json.dumps(order)) > MAX_ORDER_BYTES:
            raise TooLarge(f"the paths to merge are too long: more than {MAX_ORDER_BYTES >> 10} KiB together")
        if ours.parts.mount_namespace < 0:
            raise MachineFailed(f"machine {ours.id} is gone")
        self._sock, helpers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._sock.setblocking(False)
        with helpers:
            ours.parts.family.order_merge(order, [helpers.fileno(), ours.parts.mount_namespace])
        answer = await self._answer(timeout_s)
        assert answer is not None
        try:
            body = await asyncio.get_running_loop().run_in_executor(None, _read, answer)
        finally:
            os.close(answer)
        self._bytes, self._touched = body["bytes"], body["touched"]
        self.plan = FilesPlan(
            merged=tuple(body["merged"]),
            conflicts=tuple(_conflict(one) for one in body["conflicts"]),
            skipped=tuple((path, kind) for path, kind in body["skipped"]),
        )

    async def apply(self, decisions: Mapping[str, str], *, timeout_s: float) -> None:
        ours, _ = self._machines
        if self._bytes > WORTH_A_LOOK_BYTES:
            limits = ours.spec.limits
            used = await asyncio.get_running_loop().run_in_executor(None, _used, ours.directory, limits.max_files)
            left = limits.disk_bytes - used
            if self._bytes > left:
                text = (
                    f"the files to merge take {self._bytes >> 20} MiB, the sandbox may write {max(0, left) >> 20} MiB"
                )
                raise TooLarge(f"{text} more (rootfs_gb)")
        make_directory(self._nursery, self._layers.path(self._layer))
        told = os.memfd_create("decisions", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(told), "wb") as file:
                file.write(json.dumps(dict(decisions)).encode())
            self._say({"apply": True, "timeout_s": timeout_s}, [told])
        finally:
            os.close(told)
        await self._answer(timeout_s + END_TIMEOUT_S)

    async def keep(self) -> None:
        if not self._touched:
            return
        layer, self._layer = self._layer, ""
        try:
            self._say({"keep": True}, [])
            await self._answer(END_TIMEOUT_S)
        except PodflareError:
            pass  # its process died: then it cannot undo anything either
        finally:
            with anyio.CancelScope(shield=True):
                await self._kin.merged(*self._machines, layer)

    def _say(self, word: dict[str, Any], fds: list[int]) -> None:
        assert self._sock is not None
        try:
            socket.send_fds(self._sock, [json.dumps(word).encode()], fds)
        except OSError as exc:
            raise MachineFailed(f"the process that merges files is gone: {exc}") from exc

    async def _answer(self, timeout_s: float) -> int | None:
        """Wait for an answer, raise what it says; else the descriptor that came with it."""
        assert self._sock is not None
        await wait_readable(self._sock, timeout_s + GRACE_S, "the sandboxes' files were not merged")
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, 64 * 1024, 1)
        except OSError:
            data, fds = b"", []
        for fd in fds:
            os.set_inheritable(fd, False)
        for machine in self._machines:
            if machine.is_closed:
                data = b""
        if not data:
            for fd in fds:
                os.close(fd)
            gone = [machine.id for machine in self._machines if machine.is_closed]
            raise MachineFailed(f"machine {gone[0]} is gone" if gone else "the process that merges files died")
        answer: dict[str, Any] = json.loads(data)
        if answer["error"]:
            raise failure(str(answer["error"]), str(answer["kind"]))
        return fds[0] if fds else None

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            sock, self._sock = self._sock, None
            if sock is not None:
                await _hang_up(sock)
            layer, self._layer = self._layer, ""
            used, self._used = self._used, ()
            await self._layers.release((layer, *used) if layer else used)


async def _hang_up(sock: socket.socket) -> None:
    """End the conversation, and wait until the process at its other end has undone what is to be undone."""
    try:
        sock.shutdown(socket.SHUT_WR)
        while True:
            await wait_readable(sock, END_TIMEOUT_S, "a merge was not given up")
            data, fds, _, _ = socket.recv_fds(sock, 64 * 1024, 1)
            for fd in fds:
                os.close(fd)
            if not data:
                return
    except (OSError, PodflareError):
        return  # it hangs in the kernel
    finally:
        sock.close()


def _used(directory: Path, max_files: int) -> int:
    """Raises: TooLarge."""
    try:
        return measure(directory, max_files=max_files).size
    except TooDeep as exc:
        raise TooLarge("directories of the sandbox are nested too deep for a merge") from exc


def _conflict(body: dict[str, Any]) -> FileConflict:
    ours, theirs = (None if body[key] is None else MergeSide(**body[key]) for key in ("ours", "theirs"))
    return FileConflict(
        body["name"], body["why"], ours, theirs, body["version"], tuple(body["paths"]), tuple(body["if_ours"])
    )


def _read(fd: int) -> dict[str, Any]:
    """The plan.  In a thread: it can have many megabytes."""
    size = os.fstat(fd).st_size
    if size > MAX_PLAN_BYTES:
        raise TooLarge(f"the sandboxes differ in too much: a plan of {size} bytes")
    body: dict[str, Any] = json.loads(os.pread(fd, size, 0))
    return body
