"""What machines of one engine were, as far as living ones have it in common: saved VMs, and what came over in merges.

A fork saves its parent for the children to go on from; the folder is kept as long as two living machines have that
moment as their base.  Of a snapshot the files are held under other names, so that it may be removed meanwhile.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from podflare.engines.ancestry import History
from podflare.engines.kinship import CountedFolders, Kinship
from podflare.engines.linux.ending import remove_tree
from podflare.engines.microvm.bygone import Lists
from podflare.engines.microvm.machine import MicrovmMachine
from podflare.engines.microvm.origins import Origin


class Past:
    """Of one engine."""

    def __init__(self, folder: Path, roots: Path) -> None:
        """Args: folder, roots: of this daemon alone; they need not exist yet."""
        self.folders = CountedFolders(folder)
        self.lists = Lists()
        self._roots = roots
        self.kin = Kinship(self.folders)
        self._snapshots: dict[str, History] = {}
        self._removing: set[asyncio.Future[None]] = set()

    @contextmanager
    def held(self) -> Iterator[str]:
        """The name of a new folder, which goes at the end of the block unless others use it then.  Raises: OSError."""
        name = self.folders.new()
        self.folders.retain((name,))
        try:
            self.folders.path(name).mkdir(mode=0o700)
            yield name
        finally:
            self._let_go(name)

    def _let_go(self, name: str) -> None:
        for unused in self.folders.give_back((name,)):
            removing = asyncio.get_running_loop().run_in_executor(None, remove_tree, self.folders.path(unused))
            self._removing.add(removing)
            removing.add_done_callback(self._removing.discard)

    def born(self, parent: MicrovmMachine, children: Sequence[MicrovmMachine], name: str) -> None:
        """A fork was made: this folder has what the parent was."""
        self.kin.born(parent, children, (name,))

    async def gone(self, machine: MicrovmMachine) -> None:
        """A machine is closed."""
        await self.kin.gone(machine)

    def snapshot_taken(self, name: str, machine: MicrovmMachine) -> None:
        """What goes on from this snapshot has this moment in common with the machine."""
        self.snapshot_removed(name)
        self._snapshots[name] = self._moment(machine)

    def snapshot_removed(self, name: str) -> None:
        """Another one may get its name."""
        moment = self._snapshots.pop(name, None)
        if moment is not None:
            self._let_go(moment[0].layers[0])

    async def hold_snapshot(self, name: str, origin: Origin) -> History | None:
        """The history of what goes on from a snapshot, whose files are `origin`; None if they cannot be held."""
        if name not in self._snapshots:
            self._snapshots[name] = self._moment(None)
        moment = self._snapshots[name]
        folder = self.folders.path(moment[0].layers[0])
        try:
            await asyncio.get_running_loop().run_in_executor(None, _link_files, origin, folder)
        except OSError:
            return None
        return moment

    def hold_root(self, root: Path) -> Path:
        """Another name of a snapshot's root, for what goes on from it and its forks: the snapshot may be removed.

        The same one if there can be no other.  Blocks.
        """
        try:
            status = root.stat()
            held = self._roots / f"{status.st_dev}-{status.st_ino}"
            self._roots.mkdir(mode=0o700, exist_ok=True)
            if not held.exists():
                os.link(root, held)
        except OSError:
            return root
        return held

    def _moment(self, machine: MicrovmMachine | None) -> History:
        layer = self.folders.new()
        self.folders.retain((layer,))
        return self.kin.moment(machine, (layer,))

    async def aclose(self) -> None:
        """Precondition: all machines are closed."""
        for name in list(self._snapshots):
            self.snapshot_removed(name)
        if self._removing:
            await asyncio.wait(self._removing)
        await asyncio.get_running_loop().run_in_executor(None, remove_tree, self._roots)


def _link_files(origin: Origin, folder: Path) -> None:
    """The same files under other names.  Raises: OSError, on another file system for example."""
    folder.mkdir(mode=0o700, exist_ok=True)
    for path in (origin.saved.memory, origin.saved.devices, origin.disk):
        if not (folder / path.name).exists():
            os.link(path, folder / path.name)
