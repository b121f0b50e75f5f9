"""Read-only layers of forked machines: directories that several machines stack below their own, counted."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path

from podflare.engines.process.machine import Parts, end_parts, remove_tree


class Layers:
    """The layers below one machines directory.  Each is removed with its last user."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._users: dict[str, int] = {}

    def new(self) -> str:
        """Name of a layer that is to be filled; not counted yet.  The caller retains it."""
        name = f"l{secrets.token_hex(7)}"
        self._users[name] = 0
        return name

    def path(self, name: str) -> Path:
        return self._root / name

    def retain(self, names: tuple[str, ...]) -> None:
        for name in names:
            self._users[name] += 1

    def give_back(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """One user less of each; the ones that nobody uses any more are the caller's to `remove`."""
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


async def take_away(parts: Parts, layers: Layers) -> None:
    """End a machine and remove all that it has on disk, and the layers that nobody else uses."""
    await end_parts(parts)
    await asyncio.get_running_loop().run_in_executor(None, remove_tree, parts.directory)
    await layers.release(parts.layers)
