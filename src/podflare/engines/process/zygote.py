"""Host side of a zygote: start it, order machines from it, end it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

from podflare.engines.bundle import build_bundle
from podflare.engines.linux.waiting import wait_readable
from podflare.engines.process.family import Family
from podflare.errors import IsolationIncomplete, MachineFailed, PodflareError, TemplateFailed
from podflare.wire.plan import StagePlan, stage_to_json

MAX_ANSWER_BYTES = 64 * 1024
START_TIMEOUT_S = 60.0
"""Includes the template's preload imports, from a cold disk."""
ORDER_TIMEOUT_S = 20.0
LAST_WORDS_S = 2.0
_TUNABLES = "glibc.malloc.hugetlb=1"
"""Large blocks of memory in huge pages, where the kernel gives them to who asks: a fork copies page tables, and those
of 1 GiB in small pages take longer than the rest of it.  For machines' Python alone; what it executes is as ever."""


class Zygote:
    """One zygote process.  `start` before use; `aclose` ends it, and no machine of it is touched by that."""

    def __init__(self, python: str, bundle_dir: Path) -> None:
        self._python = python
        self._bundle_dir = bundle_dir
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = asyncio.Lock()
        self._pidfd = -1
        self.held = -1
        """Descriptor that keeps the files of the template; each family gets a copy, the owner closes this one."""
        self.cold = ""
        """Why nothing was preloaded, though the plan names modules."""

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def start(self, plan: StagePlan) -> None:
        """Start the interpreter and build the stage.

        Raises: IsolationIncomplete if the stage cannot be built here; the message names the step that failed.
            TemplateFailed if a module that it should preload cannot be imported.
            If raised or cancelled nothing runs.
        """
        bundle = build_bundle(self._bundle_dir)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        ours.setblocking(False)
        try:
            with theirs:
                # -I -S: nothing of the daemon's environment or its packages is looked at.
                self._process = subprocess.Popen(  # noqa: ASYNC220  # vfork: a millisecond, once per daemon
                    [self._python, "-I", "-S", str(bundle), "zygote", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    env={"GLIBC_TUNABLES": _TUNABLES},
                    cwd="/",
                )
            self._control = ours
            ours.send(stage_to_json(plan))
            answer = await self._answer(START_TIMEOUT_S)
        except BaseException:
            ours.close()
            self._control = None
            self._end()
            raise
        if "ok" not in answer:
            await self.aclose()
            if "preload" in answer:
                raise TemplateFailed(str(answer["preload"]))
            raise IsolationIncomplete(f"the process engine could not build its stage: {answer['error']}")
        self.cold = str(answer.get("cold", ""))
        self._pidfd = os.pidfd_open(self._process.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_end)

    def _on_end(self) -> None:
        """It ended by itself: nothing of it is to stay until somebody asks for its template again."""
        self._unwatch()
        if not self.alive:
            self._let_go()

    def _unwatch(self) -> None:
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)

    def _let_go(self) -> None:
        """A part of it that outlived it (guest/process/preload.py) ends with the control socket."""
        if not self._lock.locked() and self._control is not None:
            self._control.close()
            self._control = None

    async def spawn(self) -> Family:
        """A new family, the caller's to close.

        Raises: MachineFailed if the zygote refuses or is gone.
        If cancelled: no family exists.
        """
        try:
            async with self._lock:
                return await self._spawn()
        finally:
            if not self.alive:
                self._let_go()

    async def _spawn(self) -> Family:
        if self._control is None or not self.alive:
            raise MachineFailed("the zygote of this template has ended; the next create starts another one")
        # Shielded: an answer must be read by the call that ordered it, cancelled or not.
        order = asyncio.get_running_loop().create_task(self._order(self._control))
        try:
            return await asyncio.shield(order)
        except asyncio.CancelledError:
            try:
                await (await order).aclose()
            except PodflareError:
                pass  # nothing was made: nothing to give back
            raise

    async def _order(self, control: socket.socket) -> Family:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        ours.setblocking(False)
        try:
            with theirs:
                # An order for 32 machines must fit into one packet.
                ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 19)
                try:
                    socket.send_fds(control, [b"{}"], [theirs.fileno()])
                except ConnectionError:  # it ended before the order
                    raise await self._died() from None
            answer = await self._answer(ORDER_TIMEOUT_S, want_fd=True)
            if "error" in answer:
                raise MachineFailed(f"a new sandbox could not be started: {answer['error']}")
            return Family(ours, int(answer["pidfd"]), os.dup(self.held) if self.held >= 0 else -1)
        except BaseException:
            ours.close()
            raise

    async def _answer(self, timeout_s: float, *, want_fd: bool = False) -> dict[str, Any]:
        assert self._control is not None
        await wait_readable(self._control, timeout_s, "the zygote did not answer")
        try:
            data, received, _, _ = socket.recv_fds(self._control, MAX_ANSWER_BYTES, 1)
        except ConnectionResetError:  # it ended with the order unread
            data, received = b"", []
        if not data:
            raise await self._died()
        answer: dict[str, Any] = json.loads(data)
        if want_fd and received:
            os.set_inheritable(received[0], False)
            answer["pidfd"] = received[0]
        return answer

    async def _died(self) -> MachineFailed:
        return MachineFailed(f"the zygote died: {await self._last_words()}")

    async def _last_words(self) -> str:
        process = self._process
        if process is None or process.stderr is None:
            return "no message"
        try:
            await asyncio.get_running_loop().run_in_executor(None, process.wait, LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            return "no message"
        # What is there, not up to the end: its families have the other end of the pipe, too, and live on.
        os.set_blocking(process.stderr.fileno(), False)
        words = process.stderr.read(4096) or b""
        return words.decode("utf-8", "replace").strip() or f"exit status {process.returncode}"

    async def aclose(self) -> None:
        """End the zygote.  Idempotent."""
        if self._control is not None:
            self._control.close()
            self._control = None
        self._end()

    def _end(self) -> None:
        self._unwatch()
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()  # it holds nothing that must be saved, and its namespaces go with it
        process.wait(10)
        if process.stderr is not None:
            process.stderr.close()
