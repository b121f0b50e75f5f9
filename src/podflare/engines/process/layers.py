"""Read-only layers of forked machines: directories that several machines stack below their own, counted."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from podflare.engines.kinship import CountedFolders
from podflare.engines.linux.ending import remove_tree
from podflare.engines.process.machine import Parts, end_parts

MAX_CHAIN = 16
"""Layers that a machine may have below its own; a fork beyond that merges them all into one."""


@dataclass(frozen=True)
class Capture:
    """A copy of a machine's files that is to be made for its forks."""

    layer: str
    """The new layer."""
    merged: tuple[str, ...]
    """Layers of the parent that become part of the new one; () if the forks stack them below it."""
    below: tuple[str, ...]
    """What the forks have below their own layer, topmost first."""
    held: tuple[str, ...]
    """All that must exist until the forks do."""


def plan_capture(layer: str, parents: tuple[str, ...]) -> Capture:
    """How the files of a machine with the layers `parents` below its own are captured into the new `layer`."""
    if len(parents) < MAX_CHAIN:
        return Capture(layer, (), (layer, *parents), (layer, *parents))
    return Capture(layer, parents, (layer,), (layer, *parents))


class Layers(CountedFolders):
    """The layers below one machines directory.  Each is removed with its last user."""

    def begin(self, parents: tuple[str, ...]) -> Capture:
        """A capture that is to be made.  The caller is one user of all that it holds until `end`."""
        capture = plan_capture(self.new(), parents)
        self.retain(capture.held)
        return capture

    def end(self, capture: Capture) -> None:
        """The forks exist, and use what they need.  Does not wait."""
        for name in self.give_back(capture.held):
            # The parent was closed meanwhile, and nobody needs what was merged.
            asyncio.get_running_loop().run_in_executor(None, remove_tree, self.path(name))


async def take_away(parts: Parts, layers: Layers) -> None:
    """End a machine and remove all that it has on disk, and the layers that nobody else uses."""
    await end_parts(parts)
    await asyncio.get_running_loop().run_in_executor(None, remove_tree, parts.directory)
    await layers.release(parts.layers)
