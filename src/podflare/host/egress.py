"""Ways out of sandboxes: what was asked for becomes a policy, and each machine's uplink is given to the gate.

The gate (podflare.egress) decides and carries; here is only who has which way out, and that none outlives its machine.
"""

from __future__ import annotations

import secrets as random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import anyio

from podflare.egress.journal import KEPT_ENTRIES
from podflare.egress.policy import Policy, SecretSpec
from podflare.engines.base import Machine, UplinkEnds
from podflare.errors import BadRequest, MachineFailed
from podflare.host import telemetry
from podflare.host.config import Config
from podflare.wire.api import CreateRequest
from podflare.wire.egress import EgressLog, Reach
from podflare.wire.uplink import Uplink

if TYPE_CHECKING:
    from podflare.egress.keeper import GateKeeper

SHUT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Grant:
    """What a sandbox is allowed to reach, as it was asked for and as it was understood."""

    reach: Reach
    policy: Policy
    secrets: Mapping[str, SecretSpec]

    @property
    def hosts(self) -> dict[str, tuple[str, ...]]:
        """Of each secret, by its variable."""
        return {name: secret.hosts for name, secret in self.secrets.items()}


class Outlet:
    """The way out of one machine.  Owned by the machine's sandbox, which closes it with the machine."""

    def __init__(self, keeper: GateKeeper, grant: Grant, uplink: Uplink | None = None) -> None:
        self.grant = grant
        self.uplink = uplink or Uplink()
        """What the machine is to be born with."""
        self.key = f"net_{random.token_hex(8)}"
        self._keeper = keeper

    async def attach(self, machine: Machine) -> None:
        """Open the way.  Raises: MachineFailed, DeadlineExceeded; then it stays shut."""
        ends = _ends(machine)
        await self._keeper.attach(self.key, ends.packets, ends.listener, ends.frames)

    async def branch(self, machine: Machine) -> Outlet:
        """The way out of a fork of this one's machine: to the same, with the same placeholders and the same names.

        Raises: MachineFailed, DeadlineExceeded; then, and if cancelled, there is none.
        """
        made = Outlet(self._keeper, self.grant, self.uplink)
        ends = _ends(machine)
        await self._keeper.branch(made.key, self.key, ends.packets, ends.listener, ends.frames)
        return made

    async def log(self) -> EgressLog:
        """What the machine may reach, and what it tried to.

        Raises: MachineFailed, DeadlineExceeded if the gate cannot tell.
        """
        found, dropped = await self._keeper.journal(self.key)
        return EgressLog(self.grant.reach, self.grant.hosts, tuple(found), dropped)

    async def aclose(self) -> None:
        """Shut it: its connections end at once.  Idempotent, never raises."""
        with anyio.CancelScope(shield=True), anyio.move_on_after(SHUT_TIMEOUT_S):
            try:
                await self._keeper.detach(self.key)
            except Exception as exc:  # noqa: BLE001  # the machine is closed next, and what it sends goes nowhere
                telemetry.problem("a way out could not be shut", outlet=self.key, error=exc)


class Outlets:
    """All ways out of one daemon's sandboxes.  The gate is started for the first of them; `aclose` ends it."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._keeper: GateKeeper | None = None

    def grant(self, request: CreateRequest) -> Grant | None:
        """What a new sandbox may reach; None: nothing but itself.  Raises: BadRequest that says what is wrong."""
        reach = self._config.egress if request.egress is None else request.egress
        if request.secrets and reach is False:
            if request.egress is False:
                raise BadRequest("secrets are for requests to their hosts: leave out egress=False, or the secrets")
            reach = ()
        if reach is False:
            return None
        policy = Policy.parse(reach, private=self._config.egress_private)
        secrets = {name: SecretSpec(given.value, given.hosts) for name, given in request.secrets.items()}
        return Grant(reach, policy, secrets)

    async def open(self, grant: Grant) -> Outlet:
        """A way out for a machine that is to be made; the caller attaches it, or closes it.

        Raises: EgressUnavailable with the packages that are missing.
        """
        keeper = self._gate()
        outlet = Outlet(keeper, grant)
        attached = await keeper.prepare(outlet.key, grant.policy, grant.secrets)
        ca_pem = (attached.ca_pem or b"").decode("ascii")
        outlet.uplink = Uplink(tuple(sorted(attached.placeholders.items())), ca_pem)
        return outlet

    def _gate(self) -> GateKeeper:
        if self._keeper is None:
            # Here: most daemons never have a gate, and the first sandbox of a process waits for every import.
            from podflare.egress.keeper import GateKeeper, GateSettings

            config = self._config
            self._keeper = GateKeeper(GateSettings(config.egress_private, config.egress_resolvers, config.egress_ca))
        return self._keeper

    async def aclose(self) -> None:
        """End the gate.  Idempotent."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            await keeper.aclose()


def join_logs(earlier: EgressLog, later: EgressLog) -> EgressLog:
    """One log of both, with the later one's terms.  The oldest entries go where there are too many."""
    entries = earlier.entries + later.entries
    over = max(0, len(entries) - KEPT_ENTRIES)
    return replace(later, entries=entries[over:], dropped=earlier.dropped + later.dropped + over)


def _ends(machine: Machine) -> UplinkEnds:
    if machine.uplink is None:
        raise MachineFailed(f"machine {machine.id} is gone")
    return machine.uplink
