"""Read-only layers of forked machines: directories that several machines stack below their own, counted."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path

from podflare.engines.process.machine import remove_tree


class Layers:
    """The layers below one machines directory.  Each is removed with its last user."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._users: dict[str, int] = {}

    def new(self) -> str:
        """Name of a layer that is to be filled; not counted yet.  The caller retains or `discard`s it."""
        name = f"l{secrets.token_hex(7)}"
        self._users[name] = 0
        return name

    def path(self, name: str) -> Path:
        return self._root / name

    def retain(self, names: tuple[str, ...]) -> None:
        for name in names:
            self._users[name] += 1

    async def release(self, names: tuple[str, ...]) -> None:
        """One user less of each; unused ones are removed."""
        for name in names:
            self._users[name] -= 1
            if self._users[name] <= 0:
                await self.discard(name)

    async def discard(self, name: str) -> None:
        """Remove a layer that nobody uses."""
        del self._users[name]
        await asyncio.get_running_loop().run_in_executor(None, remove_tree, self.path(name))
