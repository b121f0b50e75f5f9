"""Which sandboxes exist and who owns them, and what is told about those that are gone.  Makes and ends none."""

from __future__ import annotations

import re
import secrets
from dataclasses import replace

from podflare.errors import SandboxNotFound
from podflare.host.sandbox import Sandbox
from podflare.host.store import Store

_ID = re.compile(r"^sbx_[0-9a-f]{32}$", re.ASCII)
NOT_FOUND = "sandbox not found"


def new_sandbox_id() -> str:
    return "sbx_" + secrets.token_hex(16)


class Registry:
    """Live sandboxes by id, and the store's memory of the others.

    An owner sees only its own: another owner's id answers exactly like one that was never issued.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._live: dict[str, Sandbox] = {}
        self._forks: dict[str, dict[str, Sandbox]] = {}
        """Live forks by the id of what they were forked from, which may be gone."""

    def __len__(self) -> int:
        return len(self._live)

    def add(self, sandbox: Sandbox) -> None:
        self._live[sandbox.id] = sandbox
        self._hang(sandbox)
        self._store.issued(sandbox.id, sandbox.owner)

    async def recorded(self) -> None:
        """Wait until the ids issued so far are known to the next daemon, too, however this one ends."""
        await self._store.recorded()

    def ended(self, sandbox: Sandbox, cause: str) -> None:
        """From now on the sandbox is one that was."""
        self._live.pop(sandbox.id, None)
        self._unhang(sandbox)
        self._store.ended(sandbox.id, cause)

    def _hang(self, sandbox: Sandbox) -> None:
        if sandbox.lineage.parent_id is not None:
            self._forks.setdefault(sandbox.lineage.parent_id, {})[sandbox.id] = sandbox

    def _unhang(self, sandbox: Sandbox) -> None:
        parent_id = sandbox.lineage.parent_id
        siblings = self._forks.get(parent_id, {}) if parent_id is not None else {}
        siblings.pop(sandbox.id, None)
        if parent_id is not None and not siblings:
            self._forks.pop(parent_id, None)

    def _move(self, sandbox: Sandbox, parent_id: str | None) -> None:
        self._unhang(sandbox)
        sandbox.lineage = replace(sandbox.lineage, parent_id=parent_id)
        self._hang(sandbox)

    def forks_of(self, sandbox_id: str) -> tuple[str, ...]:
        """Ids of its live forks, oldest first."""
        return tuple(self._forks.get(sandbox_id, ()))

    def succeed(self, winner: Sandbox, heir: Sandbox) -> None:
        """`heir` is about to become what `winner` is: the winner's forks are then its own.

        An heir that descends from the winner takes its place in the tree, which thereby stays one.
        """
        above = heir.lineage.parent_id
        while above is not None and above != winner.id:
            known = self._live.get(above)
            above = known.lineage.parent_id if known is not None else None
        if above is not None:
            self._move(heir, winner.lineage.parent_id)
        for fork in list(self._forks.get(winner.id, {}).values()):
            self._move(fork, heir.id)

    def owned_by(self, owner: str) -> list[Sandbox]:
        """Oldest first."""
        return [sandbox for sandbox in self._live.values() if sandbox.owner == owner]

    def all(self) -> list[Sandbox]:
        return list(self._live.values())

    def live(self, sandbox_id: str, owner: str) -> Sandbox | None:
        sandbox = self._live.get(sandbox_id)
        return sandbox if sandbox is not None and sandbox.owner == owner else None

    async def get(self, sandbox_id: str, owner: str) -> Sandbox:
        """The live sandbox.

        Raises: SandboxNotFound; the message says why it is gone if it was this owner's.
        """
        sandbox = self.live(sandbox_id, owner)
        if sandbox is not None:
            return sandbox
        cause = await self.cause_of_end(sandbox_id, owner)
        raise SandboxNotFound(f"{NOT_FOUND}: {sandbox_id} is gone: {cause}" if cause else NOT_FOUND)

    async def cause_of_end(self, sandbox_id: str, owner: str) -> str | None:
        """Why this owner's former sandbox ended; None if it never had such a sandbox."""
        if not _ID.match(sandbox_id):
            return None
        row = await self._store.find(sandbox_id)
        if row is None or row.owner != owner:
            return None
        return row.cause or "it is ending"
