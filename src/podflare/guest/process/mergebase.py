"""Writes down what a merge brought over: a layer that, laid over what two machines had in common, is their next base.

It holds, for each place where the other machine had changed something, what that one has there; as in all layers
a device 0:0 says that nothing is there.  Runs where compare.py does, before anything is changed.
"""

from __future__ import annotations

import os
import stat
from typing import Dict, List, Optional, Sequence

from podflare.guest.process.capture import merge_below
from podflare.guest.process.compare import Entry, Layer, open_stack
from podflare.guest.process.room import Room
from podflare.guest.process.threeway import UNMERGEABLE, Unit
from podflare.guest.process.transplant import DIRECTORY, found, remove, transplant

_OPAQUE = "user.overlay.opaque"


class Places:
    """Stacks of one machine's overlays, opened as they are needed."""

    def __init__(self, chain: Sequence[str], lowers: Dict[str, str]) -> None:
        """Args: lowers: of each overlay its directory of the template."""
        self._chain = chain
        self._lowers = lowers
        self._stacks: Dict[str, List[Layer]] = {}

    def stack(self, overlay: str) -> List[Layer]:
        if overlay not in self._stacks:
            self._stacks[overlay] = open_stack(self._chain, overlay, self._lowers[overlay])
        return self._stacks[overlay]

    def close(self) -> None:
        for stack in self._stacks.values():
            for layer in stack:
                os.close(layer.fd)
        self._stacks = {}


def write_base(
    layer: str,
    former: Optional[str],
    units: Sequence[Unit],
    base: Places,
    theirs: Places,
    mounts: Dict[str, str],
    room: Room,
) -> None:
    """Fill the new layer.

    Args:
        former: the layer of an earlier merge of the two, which goes on to hold but where `units` say otherwise.
        mounts: where each overlay is mounted.
        room: for what comes over.
    Raises: OSError, Changed, Outgrown; what was written so far is the caller's to remove.
    """
    for unit in units:
        top = f"/machines/{layer}/{unit.overlay}/upper"
        os.makedirs(top, 0o755, exist_ok=True)
        parts = [part for part in unit.path[len(mounts[unit.overlay].rstrip("/")) :].split("/") if part]
        folder = os.open(top, DIRECTORY)
        try:
            for depth, part in enumerate(parts[:-1]):
                inner = _enter(folder, part, parts[: depth + 1], (base.stack(unit.overlay), theirs.stack(unit.overlay)))
                os.close(folder)
                folder = inner
            with found(theirs.stack(unit.overlay), parts) as entry:
                _put(folder, unit, parts[-1], entry, room)
        finally:
            os.close(folder)

    if former is not None:
        for overlay in os.listdir(f"/machines/{former}"):
            os.makedirs(f"/machines/{layer}/{overlay}/upper", 0o755, exist_ok=True)
            places = [os.open(f"/machines/{name}/{overlay}/upper", DIRECTORY) for name in (former, layer)]
            try:
                merge_below(places[0], places[1], 0)
            finally:
                for fd in places:
                    os.close(fd)


def _enter(folder: int, name: str, parts: List[str], stacks: Sequence[List[Layer]]) -> int:
    """A directory on the way; a new one with the mode that it has below, for what is on top hides that."""
    try:
        return os.open(name, DIRECTORY, dir_fd=folder)
    except FileNotFoundError:
        os.mkdir(name, 0o755, dir_fd=folder)
    inner = os.open(name, DIRECTORY, dir_fd=folder)
    for stack in stacks:
        with found(stack, parts) as below:
            if below is not None and below.kind == "directory":
                os.fchmod(inner, below.mode)
                break
    return inner


def _put(folder: int, unit: Unit, name: str, entry: Optional[Entry], room: Room) -> None:
    if not unit.whole and entry is not None:
        try:
            os.mkdir(name, dir_fd=folder)
        except FileExistsError:
            pass
        inner = os.open(name, DIRECTORY, dir_fd=folder)
        try:
            os.fchmod(inner, entry.mode)
        finally:
            os.close(inner)
        return
    try:
        remove(folder, name)
    except FileNotFoundError:
        pass
    if entry is None or entry.kind in UNMERGEABLE:
        os.mknod(name, stat.S_IFCHR | 0o600, 0, dir_fd=folder)
        return
    transplant(entry, folder, name, room, path=unit.path)
    if entry.kind == "directory" and unit.base_is_folder:
        inner = os.open(name, DIRECTORY, dir_fd=folder)
        try:
            os.setxattr(inner, _OPAQUE, b"y")
        finally:
            os.close(inner)
