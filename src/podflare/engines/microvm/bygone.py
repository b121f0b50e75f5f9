"""What two machines were when they were last one, told by a copy of that moment that is restored only to be asked.

It stands still: nothing of its sandbox runs on in it.  As it never changes, short lists of its files are remembered.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

from podflare.engines.linux.waiting import to_the_end
from podflare.engines.microvm.control import Control
from podflare.engines.microvm.diff import Entry, list_files
from podflare.engines.microvm.machine import MicrovmMachine

MAX_LISTS = 16
MAX_REMEMBERED = 2000
"""Files in one list that is remembered."""
Key = tuple[str, tuple[str, ...]]


class Lists:
    """Those that are remembered."""

    def __init__(self) -> None:
        self._known: OrderedDict[Key, dict[str, Entry]] = OrderedDict()

    def get(self, key: Key) -> dict[str, Entry] | None:
        if key in self._known:
            self._known.move_to_end(key)
        return self._known.get(key)

    def put(self, key: Key, rows: dict[str, Entry]) -> None:
        if len(rows) <= MAX_REMEMBERED:
            self._known[key] = rows
            while len(self._known) > MAX_LISTS:
                self._known.popitem(last=False)


class Bygone:
    """One moment, for the time of one merge.  Whoever made it closes it."""

    def __init__(self, name: str, lists: Lists, wake: Callable[[], Coroutine[Any, Any, MicrovmMachine]]) -> None:
        """Args: name: of the moment; wake: restores it, and leaves nothing if it is cancelled."""
        self._name = name
        self._lists = lists
        self._wake = wake
        self._waking: asyncio.Task[MicrovmMachine] | None = None

    async def control(self) -> Control:
        """To ask it.  Raises: as `wake`."""
        if self._waking is None:
            self._waking = asyncio.get_running_loop().create_task(self._wake())
        return (await self._waking).control

    async def rows(self, paths: list[str], *, timeout_s: float) -> dict[str, Entry]:
        """Raises: as `wake`; as diff.list_files."""
        key = (self._name, tuple(paths))
        known = self._lists.get(key)
        if known is None:
            known = await list_files(await self.control(), paths, timeout_s)
            self._lists.put(key, known)
        return known

    async def aclose(self) -> None:
        """Idempotent; to its end, however often it is cancelled."""
        waking, self._waking = self._waking, None
        if waking is not None:
            waking.cancel()
            await to_the_end(_end(waking))


async def _end(waking: asyncio.Task[MicrovmMachine]) -> None:
    await asyncio.wait([waking])
    if not waking.cancelled() and waking.exception() is None:
        await waking.result().aclose()
