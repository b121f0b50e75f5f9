"""What the living machines of one engine have in common: the forks that they came through, and what was merged since.

Knows names of layers, each a folder that is there as long as somebody counts on it, and nothing of what is in them.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from podflare.engines.ancestry import Fork, History, common_base, is_base, lengthened
from podflare.engines.linux.ending import remove_tree
from podflare.errors import Conflict


class CountedFolders:
    """Folders below one.  Each is removed with its last user."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._users: dict[str, int] = {}

    def new(self) -> str:
        """Name of one that is to be made and filled; not counted yet.  The caller retains it."""
        name = f"l{secrets.token_hex(7)}"
        self._users[name] = 0
        return name

    def path(self, name: str) -> Path:
        return self._root / name

    def retain(self, names: tuple[str, ...]) -> None:
        """Raises: KeyError if one of them is not there any more; then none is retained."""
        if not self._users.keys() >= set(names):
            raise KeyError(names)
        for name in names:
            self._users[name] += 1

    def give_back(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """One user less of each; the ones that nobody uses any more are the caller's to remove."""
        for name in names:
            self._users[name] -= 1
        unused = tuple(name for name in names if self._users[name] <= 0)
        for name in unused:
            del self._users[name]
        return unused

    async def release(self, names: tuple[str, ...]) -> None:
        """One user less of each; unused ones are removed."""
        for name in self.give_back(names):
            await asyncio.get_running_loop().run_in_executor(None, remove_tree, self.path(name))


class Relative(Protocol):
    """A machine, as far as this matters here."""

    id: str

    @property
    def is_closed(self) -> bool: ...


class Kinship:
    """Of all machines of one engine."""

    def __init__(self, layers: CountedFolders) -> None:
        self._layers = layers
        self._forks = 0
        self._histories: dict[str, History] = {}
        """Of the living ones that are forks or have been forked."""
        self._kept: dict[int, Fork] = {}
        """Forks that two living machines have as their base; their layers are used here."""
        self._merged: dict[frozenset[str], str] = {}
        """Of two machines that were merged: the layer that goes on top of their base."""

    def moment(self, machine: Relative | None, layers: tuple[str, ...]) -> History:
        """The history of who goes on from what a machine is now.

        Args:
            machine: None for one that nobody knows any more.
            layers: what shows its files at this moment.
        """
        self._forks += 1
        if machine is None:
            return (Fork(self._forks, "", layers),)
        history = self._histories.get(machine.id, ())
        if not machine.is_closed:  # else it is gone already, and would be remembered for ever
            self._histories[machine.id] = history
        return lengthened(history, Fork(self._forks, machine.id, layers))

    def goes_on(self, moment: History, machines: Iterable[Relative]) -> None:
        """These machines go on from there.  Precondition: somebody uses its layers."""
        self._histories.update((machine.id, moment) for machine in machines)
        fork = moment[0]
        if fork.number not in self._kept and is_base(fork, self._histories):
            self._layers.retain(fork.layers)
            self._kept[fork.number] = fork

    def born(self, parent: Relative, children: Sequence[Relative], layers: tuple[str, ...]) -> None:
        """A fork was made.  What the parent has been merged with, its children have been.

        Args: layers: as of `moment`; somebody uses them.
        """
        partners = [(pair - {parent.id}, layer) for pair, layer in self._merged.items() if parent.id in pair]
        self.goes_on(self.moment(parent, layers), children)
        for partner, layer in partners:
            for child in children:
                self._layers.retain((layer,))
                self._merged[partner | {child.id}] = layer

    def base_of(self, ours: Relative, theirs: Relative) -> tuple[tuple[str, ...], str | None]:
        """The layers of the base without that of their latest merge, and that one.  The caller releases them all.

        Raises: Conflict if the base is not there any more.
        """
        former = self._merged.get(frozenset((ours.id, theirs.id)))
        histories = (self._histories.get(machine.id, ()) for machine in (ours, theirs))
        base = common_base(ours.id, next(histories), theirs.id, next(histories))
        try:
            if base is None:
                raise KeyError
            self._layers.retain(tuple(name for name in (former, *base) if name))
        except KeyError:
            text = "what these two sandboxes were when they were last one is not kept any more: they cannot be merged"
            raise Conflict(text) from None
        return base, former

    async def merged(self, ours: Relative, theirs: Relative, layer: str) -> None:
        """A merge was kept: the pair's base moves on.  Takes over the caller's use of the layer."""
        pair = frozenset((ours.id, theirs.id))
        former = self._merged.pop(pair, None)
        if not (ours.is_closed or theirs.is_closed):
            self._merged[pair] = layer
        else:
            await self._layers.release((layer,))
        if former is not None:
            await self._layers.release((former,))

    async def gone(self, machine: Relative) -> None:
        """A machine is closed: nothing can be merged with it any more."""
        history = self._histories.pop(machine.id, ())
        # Only of these can it be that they were a base with it, and are none without.
        parents = {machine.id, *(fork.parent for fork in history)}
        # All are found before the first is waited for: another machine may go meanwhile.
        near = [fork for fork in self._kept.values() if fork.parent in parents]
        unneeded = [fork for fork in near if not is_base(fork, self._histories)]
        for fork in unneeded:
            del self._kept[fork.number]
        pairs = [self._merged.pop(pair) for pair in list(self._merged) if machine.id in pair]
        for layers in [*(fork.layers for fork in unneeded), *((layer,) for layer in pairs)]:
            await self._layers.release(layers)
