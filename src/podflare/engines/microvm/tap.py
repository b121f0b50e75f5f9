"""The wire of a VM whose VMM knows no other than a tap: a network namespace with only that in it, and the VMM.

A saved VM names its tap, so all taps have one name, each in a namespace of its own.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from podflare.engines.microvm.outpost import Outpost

NAME = "tap0"


@dataclass(frozen=True)
class Entrance:
    """The way into the namespace, as long as the Tap is not closed.

    Paths, not descriptors that are inherited: a VMM has none of them.  Not the jailer's own way either, for some of its
    versions follow no link there.
    """

    network: str
    user: str | None
    """Of the user namespace that it belongs to; None where that is everybody's."""

    def wrap(self, command: list[str]) -> list[str]:
        """`command` in there; as an ordinary user with all capabilities in that user namespace."""
        user = [] if self.user is None else [f"--user={self.user}", "--preserve-credentials"]
        return ["nsenter", *user, f"--net={self.network}", "--", *command]


class Tap(Outpost):
    """One VM's.  May be closed once the VMM has opened the tap; what `frames` gave lives on with it."""

    def __init__(self, user_id: int | None) -> None:
        """Args: user_id: the VMM's; None: this process's own.  Raises: EgressUnavailable."""
        self._mapped = os.geteuid() != 0
        owner = 0 if self._mapped else user_id or 0
        super().__init__("tap", NAME, str(owner), count=3)

    async def frames(self) -> socket.socket:
        """What the machine's interface sends and receives (vmm.Vm.frames), the caller's.  Raises: as `descriptors`."""
        frames, _, _ = await self.descriptors()
        return socket.socket(fileno=os.dup(frames))

    async def entrance(self) -> Entrance:
        """Raises: as `descriptors`."""
        _, network, user = (f"/proc/{os.getpid()}/fd/{fd}" for fd in await self.descriptors())
        return Entrance(network, user if self._mapped else None)
