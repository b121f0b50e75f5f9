"""Where connections of one VM's programs are accepted: a network namespace with a tun and a listener in it."""

from __future__ import annotations

from podflare.engines.microvm.outpost import Outpost


class Landing(Outpost):
    """One VM's."""

    def __init__(self) -> None:
        """Raises: EgressUnavailable."""
        super().__init__("landing", count=2)

    async def ends(self) -> tuple[int, int]:
        """(tun, listener), which stay this object's.  Raises: as `descriptors`."""
        tun, listener = await self.descriptors()
        return tun, listener
