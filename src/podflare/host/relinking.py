"""The conversation with a guest whose machine is copied or saved, which may end it: it goes on over another channel."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio

from podflare.engines.base import Machine
from podflare.errors import PodflareError
from podflare.host.guest_link import GuestLink

RELINK_TIMEOUT_S = 10.0
SAVED = "the machine was copied or saved meanwhile, which ended its conversation; try again"


@asynccontextmanager
async def across_save(
    machine: Machine,
    former: GuestLink,
    replaced: Callable[[GuestLink], None],
    down: Callable[[str, bool], None],
) -> AsyncIterator[None]:
    """Around a fork or a snapshot of `machine`.

    If its channel is another one afterwards, `replaced` is called with the new link, the former one is closed, and
    transfers that were under way in it fail and say why.  `down` is called as `GuestLink.when_down` is, at the end, if
    there is no link any more.
    """
    channel = machine.channel
    former.expect_end(SAVED)
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):
            if machine.channel is not channel:
                await _relink(machine, former, replaced, down)
            elif former.down:
                down(former.down, False)
            else:
                former.expect_end("")


async def _relink(
    machine: Machine, former: GuestLink, replaced: Callable[[GuestLink], None], down: Callable[[str, bool], None]
) -> None:
    try:
        link = await GuestLink.open(machine, timeout_s=RELINK_TIMEOUT_S)
    except (PodflareError, OSError) as exc:
        former.close(SAVED)
        down(str(exc), False)
    else:
        replaced(link)
        former.close(SAVED)
