"""Host side of a family: the processes that share one user namespace, a sandbox and all its forks."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from typing import Any

from podflare.engines.base import Limits
from podflare.engines.linux.ending import end_process
from podflare.engines.linux.waiting import wait_readable
from podflare.errors import MachineFailed
from podflare.wire.plan import MachinePlan, machine_to_dict

CAPTURE_TIMEOUT_S = 120.0
GRACE_S = 2.0
"""So much later than the process that copies gives up, it is given up."""
MAX_ANSWER_BYTES = 64 * 1024


class Family:
    """One family process.  Ended by `aclose`, and with it every machine of the family."""

    def __init__(self, control: socket.socket, pidfd: int, held: int = -1) -> None:
        """Args: held: descriptor of what must be there as long as the family is; closed with it."""
        self._control = control
        self._pidfd = pidfd
        self._held = held
        self._lock = asyncio.Lock()
        self.members = 0
        """Machines that were born and not removed yet; whoever takes the last one away closes the family."""

    def order_machines(
        self, plans: list[MachinePlan], fds: list[int], *, below: int | None, carrier: int | None = None
    ) -> None:
        """Have machines made; each reports on its own birth socket.

        Args:
            fds: for each plan its birth descriptors (guest/process/family.Birth).
            below: descriptor of the PID namespace below which they are to be; None for the family's own.
            carrier: for a machine whose REPL is carried into it: its socket to the carrier (guest/process/carry.py).
        Raises: MachineFailed if the family is gone.
        """
        body = {"plans": [machine_to_dict(plan) for plan in plans]}
        first = [fd for fd in (below, carrier) if fd is not None]
        self._send({**body, "nested": below is not None, "carried": carrier is not None}, first + fds)

    def order_carry(self, source: int, target: int, answer_to: int, *, timeout_s: float) -> None:
        """Have a REPL's memory carried (guest/process/carry.py), the answer sent to a socket.

        Args:
            source, target: sockets to the REPL and to the process that is to become it.
        Raises: MachineFailed if the family is gone.
        """
        self._send({"carry": {"timeout_s": timeout_s}}, [source, target, answer_to])

    async def capture(self, machine: str, layer: str, merged: tuple[str, ...], limits: Limits) -> None:
        """Copy the writable layers of a running machine to a new layer.

        Args:
            merged: layers below the machine's own, topmost first, that become part of the new one.
            limits: the machine's, which running code may make more of by moving it about while it is copied.
        Raises: MachineFailed, DeadlineExceeded; the caller removes what was copied.
        """
        copying = asyncio.get_running_loop().create_task(self._capture(machine, layer, merged, limits))
        try:
            await asyncio.shield(copying)
        except asyncio.CancelledError:
            await asyncio.wait([copying])  # it writes into the layer, which the caller is about to remove
            raise

    async def _capture(self, machine: str, layer: str, merged: tuple[str, ...], limits: Limits) -> None:
        order = {
            "capture": machine,
            "to": layer,
            "merged": merged,
            # Twice: between two looks at the disk a machine can pass its limit, and what is compressed reads as more.
            "entries": 2 * limits.max_files,
            "bytes": 2 * limits.disk_bytes,
            "timeout_s": CAPTURE_TIMEOUT_S,
        }
        answer: dict[str, Any] = {}
        async with self._lock:
            self._send(order, [])
            while answer.get("captured") != layer:  # the answer to an order that was given up may come now
                limit_s = CAPTURE_TIMEOUT_S + GRACE_S
                await wait_readable(self._control, limit_s, "the files of the sandbox were not copied")
                data = self._control.recv(MAX_ANSWER_BYTES)
                answer = json.loads(data) if data else {"captured": layer, "error": "the family ended"}
        if answer["error"]:
            raise MachineFailed(f"the files of the sandbox could not be copied: {answer['error']}")

    def order_comparison(self, order: dict[str, Any], answer_to: int) -> None:
        """Have the layers of two machines compared (guest/process/comparison.py), the answer sent to a socket.

        Raises: MachineFailed if the family is gone.
        """
        self._send({"compare": order}, [answer_to])

    def order_merge(self, order: dict[str, Any], fds: list[int]) -> None:
        """Have files merged (guest/process/merging.py).

        Args: fds: the socket of the conversation, the mount namespace of the machine that is to be changed.
        Raises: MachineFailed if the family is gone.
        """
        self._send({"merge": order}, fds)

    def _send(self, body: dict[str, Any], fds: list[int]) -> None:
        try:
            socket.send_fds(self._control, [json.dumps(body).encode()], fds)
        except OSError as exc:
            raise MachineFailed(f"the sandbox's family cannot be reached: {exc}") from exc

    async def aclose(self) -> None:
        """SIGKILL the family and wait: the kernel ends all below it first (pid_namespaces(7)).  Idempotent."""
        self._control.close()
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            await end_process(pidfd)
        held, self._held = self._held, -1
        if held >= 0:
            os.close(held)
