"""What a sandbox lives in, and exchanges as a whole when another one is merged into it."""

from __future__ import annotations

from typing import NamedTuple

import anyio

from podflare.engines.base import Machine
from podflare.host.egress import Outlet
from podflare.host.guest_link import GuestLink


class Body(NamedTuple):
    """A machine, the conversation with its guest, and its way out, if it has one."""

    machine: Machine
    link: GuestLink
    outlet: Outlet | None = None

    async def aclose(self) -> None:
        """End all three.  Idempotent, shielded from cancellation."""
        with anyio.CancelScope(shield=True):
            if self.outlet is not None:
                await self.outlet.aclose()  # first: what the machine sends while it dies goes nowhere
            self.link.close()
            await self.machine.aclose()
