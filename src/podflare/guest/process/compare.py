"""Compares the files of two machines by their layers: what neither touched above a layer of both is not looked at.

Runs in a process of the family, on its stage, over trees that hostile user code made and may change meanwhile: every
step goes from a directory descriptor to a name in it and follows no link.

A machine's tree is a stack of directories, topmost first: its own writable layer, the layers it was forked with, the
template's.  How overlayfs marks them (Documentation/filesystems/overlayfs.rst): a device 0:0 hides a name below, the
attribute user.overlay.opaque on a directory hides all that lower directories of its name hold.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Callable, Dict, FrozenSet, Iterator, List, Optional, Sequence, Tuple

from podflare.guest.descriptors import read_link
from podflare.guest.holes import next_data
from podflare.wire.paths import is_inside, outermost
from podflare.wire.plan import StagePlan

MAX_DEPTH = 256
"""Deeper directories are refused: each level holds descriptors open."""
MAX_ENTRIES = 200_000
MAX_NAME_BYTES = 16 * 1024 * 1024
"""Of all paths of one answer together."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
GONE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO)
"""What opening a name says that is not what it just was."""
_OPAQUE = "user.overlay.opaque"
_CHUNK = 1 << 20
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


class TooMuch(Exception):
    """More differs than an answer holds."""


class Layer:
    """One directory of a stack.  Equal layers are the same directory of the same layer."""

    def __init__(self, name: str, fd: int, *, template: bool) -> None:
        self.name = name
        """Of the whole layer; empty for the template's."""
        self.fd = fd
        self.template = template


class Entry:
    """What one machine has under a name: anything but nothing."""

    def __init__(self, status: os.stat_result, where: Layer, name: str, folders: Sequence[Layer] = ()) -> None:
        self.status = status
        self.kind = _KINDS.get(stat.S_IFMT(status.st_mode), "device")
        self.mode = stat.S_IMODE(status.st_mode)
        self.size = status.st_size if self.kind in ("file", "link") else None
        self.folders = folders
        """Of a directory: the stack of directories that make it up, topmost first; open until `close`."""
        self._where = where
        self._name = name

    def open(self) -> int:
        """A descriptor of the file.  Raises: OSError, also if it is no file any more."""
        fd = os.open(self._name, _FILE, dir_fd=self._where.fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.ENXIO, "not a file any more")
        return fd

    def target(self) -> str:
        """Where the link points to.  Raises: OSError."""
        return read_link(self._name, self._where.fd)

    def close(self) -> None:
        for layer in self.folders:
            os.close(layer.fd)
        self.folders = ()


def resolve(stack: Sequence[Layer], name: str) -> Optional[Entry]:
    """What the stack shows under `name`; None if nothing.  The caller closes it."""
    folders: List[Layer] = []
    first: Optional[Tuple[os.stat_result, Layer]] = None
    for layer in stack:
        try:
            status = os.stat(name, dir_fd=layer.fd, follow_symlinks=False)
        except OSError as exc:
            if exc.errno in GONE:
                continue
            raise
        if not stat.S_ISDIR(status.st_mode):
            if first is None and not _is_whiteout(status):
                return Entry(status, layer, name)
            break
        try:
            fd = os.open(name, _DIRECTORY, dir_fd=layer.fd)
        except OSError as exc:
            if exc.errno in GONE:
                continue
            raise
        first = first or (status, layer)
        folders.append(Layer(layer.name, fd, template=layer.template))
        if not layer.template and _is_opaque(fd):
            break
    if first is None:
        return None
    return Entry(first[0], first[1], name, folders)


def _is_whiteout(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _is_opaque(fd: int) -> bool:
    try:
        return os.getxattr(fd, _OPAQUE) == b"y"
    except OSError:
        return False


Notice = Callable[[str, Optional[Entry], Optional[Entry]], None]
"""Told of every path that differs, while its entries can be read; of the top of an overlay it gets no entries."""


class Comparison:
    """One comparison on its way: `run`, then read the three lists and, of each path, both entries' facts."""

    def __init__(self, first: Sequence[str], second: Sequence[str], notice: Notice) -> None:
        """Args: first, second: names of the machines' layers, topmost first."""
        self._chains = (tuple(first), tuple(second))
        self._shared = shared_layers(first, second)
        self._notice = notice
        self._entries = 0
        self._name_bytes = 0
        self.added: List[str] = []
        self.removed: List[str] = []
        self.modified: List[str] = []

    def overlay(self, name: str, lower: str, mounted: str, path: str) -> None:
        """Compare `path` and all below it in one overlay, which is mounted on `mounted`."""
        before, after = (open_stack(chain, name, lower) for chain in self._chains)
        try:
            parts = [part for part in path[len(mounted.rstrip("/")) :].split("/") if part]
            self._descend(before, after, mounted.rstrip("/"), parts)
        finally:
            for layer in (*before, *after):
                os.close(layer.fd)

    def _descend(self, before: Sequence[Layer], after: Sequence[Layer], path: str, parts: Sequence[str]) -> None:
        if not parts:
            if _mode(before) != _mode(after):
                self._add(self.modified, path or "/", None, None)
            self._directories(before, after, path, 0)
            return
        pair = (resolve(before, parts[0]), resolve(after, parts[0]))
        try:
            if len(parts) == 1:
                self._pair(pair[0], pair[1], f"{path}/{parts[0]}", 0)
            else:
                self._descend(*_folders(pair), f"{path}/{parts[0]}", parts[1:])
        finally:
            _close(pair)

    def _directories(self, before: Sequence[Layer], after: Sequence[Layer], path: str, depth: int) -> None:
        """Compare what two directories hold."""
        if depth > MAX_DEPTH:
            raise OSError(errno.ENAMETOOLONG, f"directories nested deeper than {MAX_DEPTH}: {path[:200]}")
        for name in touched(before, after, self._shared):
            pair = (resolve(before, name), resolve(after, name))
            try:
                self._pair(pair[0], pair[1], f"{path}/{name}", depth)
            finally:
                _close(pair)

    def _pair(self, before: Optional[Entry], after: Optional[Entry], path: str, depth: int) -> None:
        if before is None or after is None:
            if after is not None:
                self._add(self.added, path, None, after)
            elif before is not None:
                self._add(self.removed, path, before, None)
        elif before.kind != after.kind or before.mode != after.mode or not same_content(before, after):
            self._add(self.modified, path, before, after)
        below = _folders((before, after))
        if below[0] or below[1]:
            self._directories(*below, path, depth + 1)

    def _add(self, where: List[str], path: str, before: Optional[Entry], after: Optional[Entry]) -> None:
        self._entries += 1
        self._name_bytes += len(path)
        if self._entries > MAX_ENTRIES or self._name_bytes > MAX_NAME_BYTES:
            raise TooMuch(
                f"more than {MAX_ENTRIES} paths differ, or {MAX_NAME_BYTES >> 20} MiB of their names; "
                "compare fewer directories (paths)"
            )
        where.append(path)
        self._notice(path, before, after)


def shared_layers(first: Sequence[str], second: Sequence[str]) -> FrozenSet[str]:
    """Names of the layers at the end of both chains, and of the template's, which is below all."""
    shared = 0
    while shared < min(len(first), len(second)) and first[len(first) - 1 - shared] == second[len(second) - 1 - shared]:
        shared += 1
    return frozenset(first[len(first) - shared :]) | {""}


def touched(before: Sequence[Layer], after: Sequence[Layer], shared: FrozenSet[str]) -> List[str]:
    """Names that can differ between two directories.

    Where both show the same shared layers, those decide alike for every name that nothing above them holds.
    """
    alike = [[layer.name for layer in stack if layer.name in shared] for stack in (before, after)]
    looked_at = [layer for layer in (*before, *after) if alike[0] != alike[1] or layer.name not in shared]
    names: Dict[str, None] = {}
    for layer in looked_at:
        names.update(dict.fromkeys(os.listdir(layer.fd)))
    return list(names)


def open_stack(chain: Sequence[str], overlay: str, lower: str) -> List[Layer]:
    """What a chain of layers has of one overlay, topmost first.  The caller closes it.  Raises: OSError."""
    stack: List[Layer] = []
    for layer in chain:
        try:
            stack.append(Layer(layer, os.open(f"/machines/{layer}/{overlay}/upper", _DIRECTORY), template=False))
        except FileNotFoundError:
            pass  # nothing of this overlay was in the layer
    stack.append(Layer("", os.open(lower, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), template=True))
    return stack


def _mode(stack: Sequence[Layer]) -> int:
    return stat.S_IMODE(os.fstat(stack[0].fd).st_mode) if stack else -1


Pair = Tuple[Optional[Entry], Optional[Entry]]


def _folders(entries: Pair) -> Tuple[Sequence[Layer], Sequence[Layer]]:
    before, after = (() if entry is None else entry.folders for entry in entries)
    return before, after


def _close(entries: Pair) -> None:
    for entry in entries:
        if entry is not None:
            entry.close()


def same_content(before: Entry, after: Entry) -> bool:
    """Of two entries of one kind.  What changes or vanishes while it is read counts as changed."""
    one, two = before.status, after.status
    if (one.st_dev, one.st_ino) == (two.st_dev, two.st_ino):
        return True
    try:
        if before.kind == "link":
            return before.target() == after.target()
        if before.kind == "file":
            return one.st_size == two.st_size and (one.st_size == 0 or _same_bytes(before, after))
        return before.kind != "device" or one.st_rdev == two.st_rdev
    except OSError as exc:
        if exc.errno in (*GONE, errno.EACCES):
            return False
        raise


def _same_bytes(before: Entry, after: Entry) -> bool:
    one = before.open()
    try:
        two = after.open()
        try:
            offset, size = 0, before.status.st_size
            while offset < size:
                # What is a hole in both is not read: a terabyte of them takes nothing to make.
                offset = min(next_data(one, offset, size), next_data(two, offset, size))
                piece = os.pread(one, _CHUNK, offset)
                if piece != os.pread(two, _CHUNK, offset):
                    return False
                if not piece:
                    break
                offset += len(piece)
            return os.fstat(one).st_size == os.fstat(two).st_size
        finally:
            os.close(two)
    finally:
        os.close(one)


def overlays_of(stage: StagePlan, paths: Sequence[str]) -> Iterator[Tuple[str, str, str, str]]:
    """(overlay, its template directory, its mount point, path) for each part of `paths` that a machine can write to."""
    mounts = [("root", "/skel", "/", True)]
    mounts += [(f"tree{n}", f"/lower/{n}", tree.target, tree.writable) for n, tree in enumerate(stage.trees)]
    for path in outermost(paths):
        holder = max((mount for mount in mounts if is_inside(path, mount[2])), key=lambda mount: len(mount[2]))
        for name, lower, mounted, writable in mounts:
            if not writable:
                continue
            if mounted == holder[2]:
                yield name, lower, mounted, path
            elif is_inside(mounted, path):
                yield name, lower, mounted, mounted
