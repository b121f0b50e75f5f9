"""Plans a three-way merge of two machines' files: what the other one changed since both were one, path by path.

Looks and decides, changes nothing.  Runs where compare.py does, over content that hostile user code wrote and may
change meanwhile; what the plan rests on is noted in marks, which are compared again when it is carried out.

`base` is what both were, `ours` the machine that is to get the changes, `theirs` the other one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from podflare.guest.process.compare import (
    MAX_DEPTH,
    MAX_ENTRIES,
    MAX_NAME_BYTES,
    Entry,
    Layer,
    TooMuch,
    open_stack,
    resolve,
    same_content,
    shared_layers,
    touched,
)
from podflare.guest.process.linemerge import MAX_FILE_BYTES, lines_of, merge_lines
from podflare.wire.paths import IDENTITY

MAX_TEXT_BYTES = 256 * 1024 * 1024
"""Of all merged texts of one plan, which are held in memory."""
_LOOKS = 8
"""How often a path of a plan may be looked at."""
UNMERGEABLE = ("socket", "device")

Mark = Optional[Tuple[object, ...]]
"""By which an entry is known again; None for nothing."""
Stacks = Tuple[Sequence[Layer], Sequence[Layer], Sequence[Layer]]
Trio = Tuple[Optional[Entry], Optional[Entry], Optional[Entry]]


class Action(NamedTuple):
    """What is done to our files at one place."""

    path: str
    mark: Mark
    """What is at the path before, once `removals` are done."""
    removals: List[Tuple[str, Mark]]
    """What goes before, what is in a directory before the directory."""
    content: Optional[bytes] = None
    """Becomes the content of the file."""
    take: bool = False
    """Their file, or their whole directory, comes to the path."""
    mode: Optional[int] = None
    """The mode of the file then; alone, only that changes."""


class Unit(NamedTuple):
    """One place where they changed something."""

    overlay: str
    path: str
    paths: List[str]
    """All that change with it."""
    action: Optional[Action]
    """None if nothing is to be done."""
    whole: bool
    """All of their directory at the path is meant, else only the entry itself."""
    base_is_folder: bool
    entries: int
    size: int
    """Bytes that come over, in so many files and directories."""
    why: str = ""
    """Why it is a conflict; empty if it is none, and then `action` holds."""
    if_theirs: Optional[Action] = None
    if_ours: Optional[Action] = None
    sides: Tuple[Optional[Dict[str, object]], Optional[Dict[str, object]]] = (None, None)
    """Type and size of ours and theirs."""
    version: str = ""
    """Says what both sides are: another one, another conflict."""


def mark_of(entry: Optional[Entry]) -> Mark:
    """Changes whenever the entry is written to or replaced; of a directory it tells only that it is one."""
    if entry is None:
        return None
    return mark_of_status(entry.status, entry.target() if entry.kind == "link" else None)


def mark_of_status(status: os.stat_result, target: Optional[str]) -> Mark:
    """As mark_of, of what is looked at elsewhere.  Inode numbers would not do: an overlay shows others."""
    if stat.S_ISDIR(status.st_mode):
        return ("directory",)
    if target is not None:
        return ("link", target)
    return (stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode), status.st_size, status.st_mtime_ns)


class ThreeWay:
    """One plan on its way: `overlay` for each part of what is to be merged, then read `units` and `skipped`."""

    def __init__(
        self, base: Sequence[str], ours: Sequence[str], theirs: Sequence[str], *, text_bytes: int = MAX_TEXT_BYTES
    ) -> None:
        """Args: names of the layers of each, topmost first; how much merged text is held."""
        self._max_text_bytes = text_bytes
        self.chains = (tuple(base), tuple(ours), tuple(theirs))
        self._changed = shared_layers(base, theirs)
        self._own = shared_layers(base, ours)
        self._overlay = ""
        self._entries = 0
        self._text_bytes = self._name_bytes = 0
        self.units: List[Unit] = []
        self.skipped: List[Tuple[str, str]] = []
        """(path, kind) of what they have that cannot be anybody else's."""

    def overlay(self, name: str, lower: str, mounted: str, path: str) -> None:
        """Plan for `path` and all below it in one overlay, which is mounted on `mounted`.  Raises: OSError, TooMuch."""
        self._overlay = name
        stacks = [open_stack(chain, name, lower) for chain in self.chains]
        try:
            parts = [part for part in path[len(mounted.rstrip("/")) :].split("/") if part]
            self._descend((stacks[0], stacks[1], stacks[2]), mounted.rstrip("/"), parts, [])
        finally:
            for stack in stacks:
                for layer in stack:
                    os.close(layer.fd)

    def _descend(self, stacks: Stacks, path: str, parts: Sequence[str], blocked: List[Tuple[str, Mark]]) -> None:
        """Args: blocked: what of ours, no directory, is where one of the path's parents would have to be."""
        if not parts:
            self._folders(stacks, path, 0)
            return
        trio = _resolve(stacks, parts[0])
        try:
            here = f"{path}/{parts[0]}"
            if len(parts) == 1:
                self._entry(trio, here, 0, blocked)
                return
            ours = trio[1]
            if ours is not None and ours.kind != "directory":
                blocked = [*blocked, (here, mark_of(ours))]
            self._descend(_stacks(trio), here, parts[1:], blocked)
        finally:
            _close(trio)

    def _folders(self, stacks: Stacks, path: str, depth: int) -> None:
        _check_depth(path, depth)
        for name in touched(stacks[0], stacks[2], self._changed):
            trio = _resolve(stacks, name)
            try:
                self._entry(trio, f"{path}/{name}", depth, [])
            finally:
                _close(trio)

    def _entry(self, trio: Trio, path: str, depth: int, blocked: List[Tuple[str, Mark]]) -> None:
        base, ours, theirs = trio
        if path in IDENTITY:
            return
        if theirs is not None and theirs.kind in UNMERGEABLE:
            if not _same(base, theirs) and not _same(ours, theirs):
                self._count(path)
                self.skipped.append((path, theirs.kind))
            return
        if _is_folder(theirs):
            self._their_folder(trio, path, depth, blocked)
        elif _is_folder(base):
            self._gone_folder(trio, path)
        elif not _same(base, theirs):
            self._changed_file(trio, path, blocked)

    def _their_folder(self, trio: Trio, path: str, depth: int, blocked: List[Tuple[str, Mark]]) -> None:
        base, ours, theirs = trio
        assert theirs is not None
        if ours is not None and _is_folder(ours):
            self._folder_mode(base if _is_folder(base) else None, ours, theirs, path)
            self._folders(_stacks(trio), path, depth + 1)
        elif _is_folder(base):
            if not self._alike(base, theirs, path):
                why = f"its content was changed there, here it is {_kind(ours)}"
                self._conflict(trio, path, why, self._taking(ours, path, blocked))
        elif _same(base, ours):
            self._settle(trio, path, self._taking(ours, path, blocked), blocked)
        else:
            self._conflict(trio, path, f"a directory there, here {_kind(ours)}", self._taking(ours, path, blocked))

    def _folder_mode(self, base: Optional[Entry], ours: Entry, theirs: Entry, path: str) -> None:
        old = None if base is None else base.mode
        if theirs.mode == old:
            return
        change = Action(path, mark_of(ours), [], mode=theirs.mode)
        trio: Trio = (base, ours, theirs)
        if ours.mode == theirs.mode:
            self._add(trio, path, [], None, whole=False)
        elif ours.mode == old:
            self._add(trio, path, [path], change, whole=False)
        else:
            why = f"both set the mode of the directory, here {ours.mode:o}, there {theirs.mode:o}"
            self._conflict(trio, path, why, change, paths=[path], whole=False)

    def _gone_folder(self, trio: Trio, path: str) -> None:
        base, ours, theirs = trio
        assert base is not None
        taking = self._taking(ours, path, [])
        if ours is None or not _is_folder(ours):
            if _same(ours, theirs):
                self._add(trio, path, [], None)
            else:
                why = f"a directory before, here it is {_kind(ours)} now, there {_kind(theirs)}"
                self._conflict(trio, path, why, taking)
        elif self._alike(base, ours, path, own=True):
            self._settle(trio, path, taking, [])
        else:
            self._conflict(trio, path, f"its content was changed here, there it is {_kind(theirs)}", taking)

    def _changed_file(self, trio: Trio, path: str, blocked: List[Tuple[str, Mark]]) -> None:
        base, ours, theirs = trio
        if _same(ours, theirs) and not (blocked and theirs is not None):
            self._add(trio, path, [], None)
        elif _same(base, ours):
            self._settle(trio, path, self._taking(ours, path, blocked), blocked)
        elif ours is not None and theirs is not None and ours.kind == theirs.kind == "file":
            self._both_files(base if base is not None and base.kind == "file" else None, ours, theirs, path)
        elif "/__pycache__/" in path:
            self._add(trio, path, [], None)  # made from the source, and made again if it does not fit
        elif ours is None:
            self._conflict(trio, path, "changed there, removed here", self._taking(ours, path, blocked))
        elif theirs is None:
            self._conflict(trio, path, "changed here, removed there", self._taking(ours, path, blocked))
        else:
            why = f"changed in both, here it is {_kind(ours)}, there {_kind(theirs)}"
            self._conflict(trio, path, why, self._taking(ours, path, blocked))

    def _both_files(self, base: Optional[Entry], ours: Entry, theirs: Entry, path: str) -> None:
        """Both have a file, and they are not the same.  Mode and content are two things."""
        trio: Trio = (base, ours, theirs)
        if "/__pycache__/" in path:
            self._add(trio, path, [], None)
            return
        old = None if base is None else base.mode
        mode: Optional[int] = ours.mode if theirs.mode in (ours.mode, old) else theirs.mode
        why = []
        if theirs.mode not in (ours.mode, old) and ours.mode != old:
            mode = None
            why.append(f"both set the mode, here {ours.mode:o}, there {theirs.mode:o}")
        merged, reason = self._content(base, ours, theirs)
        if reason:
            why.append(reason)
        modes = (ours.mode, theirs.mode) if mode is None else (mode, mode)
        versions = [
            self._writing(path, ours, choice, decided)
            for choice, decided in zip(modes, (merged, merged) if not reason else self._decided(base, ours, theirs))
        ]
        if why:
            self._conflict(trio, path, "; ".join(why), versions[1], if_ours=versions[0], paths=[path], whole=True)
        else:
            self._add(trio, path, [path] if versions[0] is not None else [], versions[0])

    def _content(self, base: Optional[Entry], ours: Entry, theirs: Entry) -> Tuple["bytes | str", str]:
        """What the content is to become ("ours", "theirs" or bytes), or why that is a conflict."""
        if same_content(ours, theirs) or (base is not None and same_content(base, theirs)):
            return "ours", ""
        if base is not None and same_content(base, ours):
            return "theirs", ""
        texts = _texts(base, ours, theirs)
        if texts is None:
            return "", f"changed in both, and no text of at most {MAX_FILE_BYTES >> 20} MiB"
        lines = merge_lines(*texts)
        if lines is None:
            return "", "both changed the same lines" if base is not None else "added in both, with other lines"
        return self._held(lines), ""

    def _decided(self, base: Optional[Entry], ours: Entry, theirs: Entry) -> Tuple["bytes | str", "bytes | str"]:
        """The content if ours is right, and if theirs is; in a text only the lines in conflict are decided by that."""
        texts = _texts(base, ours, theirs)
        if texts is None or base is None:
            return "ours", "theirs"
        mine, others = (merge_lines(*texts, favour=side) for side in ("ours", "theirs"))
        assert mine is not None and others is not None
        return self._held(mine), self._held(others)

    def _held(self, lines: List[str]) -> bytes:
        data = "".join(lines).encode()
        self._text_bytes += len(data)
        if self._text_bytes > self._max_text_bytes:
            raise TooMuch(
                f"more than {self._max_text_bytes >> 20} MiB of text to merge by lines; merge fewer directories"
            )
        return data

    @staticmethod
    def _writing(path: str, ours: Entry, mode: int, content: "bytes | str") -> Optional[Action]:
        if content == "theirs":
            return Action(path, mark_of(ours), [], take=True, mode=mode)
        if isinstance(content, bytes):
            return Action(path, mark_of(ours), [], content=content, mode=mode)
        return None if mode == ours.mode else Action(path, mark_of(ours), [], mode=mode)

    def _taking(self, ours: Optional[Entry], path: str, blocked: List[Tuple[str, Mark]]) -> Action:
        """Our entry becomes what theirs is."""
        if ours is None or ours.kind != "directory":
            return Action(path, mark_of(ours), blocked, take=True)
        removals: List[Tuple[str, Mark]] = []
        self._tree(ours, path, lambda entry, inner: removals.append((inner, mark_of(entry))), 0)
        removals.reverse()
        return Action(path, None, removals, take=True)

    def _settle(self, trio: Trio, path: str, action: Action, blocked: List[Tuple[str, Mark]]) -> None:
        """Only they changed it: done, unless one of our files is in the way."""
        if blocked and trio[2] is not None:
            self._conflict(trio, path, f"{blocked[0][0]} is no directory here", action)
        elif blocked:
            self._add(trio, path, [], None)
        else:
            self._add(trio, path, self._below(trio[1], trio[2], path), action)

    def _below(self, ours: Optional[Entry], theirs: Optional[Entry], path: str) -> List[str]:
        """All paths that change when ours becomes theirs."""
        found: Dict[str, None] = {path: None}
        if ours is not None:
            self._tree(ours, path, lambda one, inner: found.setdefault(inner), 0)
        if theirs is not None:
            left_out: List[Tuple[str, str]] = []

            def notice(entry: Entry, inner: str) -> None:
                if entry.kind in UNMERGEABLE:
                    left_out.append((inner, entry.kind))
                else:
                    found.setdefault(inner)

            self._tree(theirs, path, notice, 0)
            self.skipped += left_out
        return list(found)

    def _conflict(
        self,
        trio: Trio,
        path: str,
        why: str,
        if_theirs: Optional[Action],
        *,
        if_ours: Optional[Action] = None,
        paths: Optional[List[str]] = None,
        whole: bool = True,
    ) -> None:
        digest = hashlib.sha256()
        sides: List[Optional[Dict[str, object]]] = []
        for entry in trio[1:]:
            if entry is None or not whole:
                digest.update(repr(None if entry is None else entry.mode).encode())
            else:
                self._tree(entry, path, lambda one, inner: digest.update(repr((inner, mark_of(one))).encode()), 0)
            digest.update(b"|")
            sides.append(None if entry is None else {"type": entry.kind, "size": entry.size})
        changed = self._below(trio[1], trio[2], path) if paths is None else paths
        unit = self._unit(trio, path, changed, None, whole)
        self.units.append(
            unit._replace(
                why=why,
                if_theirs=if_theirs,
                if_ours=if_ours,
                sides=(sides[0], sides[1]),
                version=digest.hexdigest()[:32],
            )
        )

    def _add(self, trio: Trio, path: str, paths: List[str], action: Optional[Action], *, whole: bool = True) -> None:
        self.units.append(self._unit(trio, path, paths, action, whole))

    def _unit(self, trio: Trio, path: str, paths: List[str], action: Optional[Action], whole: bool) -> Unit:
        self._count(path)
        sizes: List[int] = []
        if whole and trio[2] is not None:
            self._tree(trio[2], path, lambda entry, inner: sizes.append(entry.status.st_blocks * 512), 0)
        return Unit(self._overlay, path, paths, action, whole, _is_folder(trio[0]), len(sizes), sum(sizes))

    def _tree(self, entry: Entry, path: str, notice: Callable[[Entry, str], None], depth: int) -> None:
        """Tell `notice` of an entry and of all below it, what is in a directory after the directory."""
        _check_depth(path, depth)
        self._count(path)
        notice(entry, path)
        for name in names_of(entry.folders):
            inner = resolve(entry.folders, name)
            if inner is not None:
                try:
                    self._tree(inner, f"{path}/{name}", notice, depth + 1)
                finally:
                    inner.close()

    def _alike(
        self, base: Optional[Entry], other: Optional[Entry], path: str, depth: int = 0, *, own: bool = False
    ) -> bool:
        """Whether both are the same with all that they hold."""
        _check_depth(path, depth)
        if not _same(base, other):
            return False
        if base is None or other is None or base.kind != "directory":
            return True
        for name in touched(base.folders, other.folders, self._own if own else self._changed):
            self._count(path)
            one, two = resolve(base.folders, name), resolve(other.folders, name)
            try:
                if not self._alike(one, two, f"{path}/{name}", depth + 1, own=own):
                    return False
            finally:
                _close((one, two, None))
        return True

    def _count(self, path: str) -> None:
        self._entries += 1
        self._name_bytes += len(path)
        if self._entries > _LOOKS * MAX_ENTRIES or self._name_bytes > _LOOKS * MAX_NAME_BYTES:
            raise TooMuch(
                f"more than {MAX_ENTRIES} paths to merge, or {MAX_NAME_BYTES >> 20} MiB of their names; "
                "merge fewer directories (files)"
            )


def _resolve(stacks: Stacks, name: str) -> Trio:
    found = [resolve(stack, name) for stack in stacks]
    return found[0], found[1], found[2]


def _stacks(trio: Trio) -> Stacks:
    folders = [() if entry is None else entry.folders for entry in trio]
    return folders[0], folders[1], folders[2]


def _close(trio: Trio) -> None:
    for entry in trio:
        if entry is not None:
            entry.close()


def names_of(folders: Sequence[Layer]) -> List[str]:
    """All names that a directory made of these may show."""
    names: Dict[str, None] = {}
    for layer in folders:
        names.update(dict.fromkeys(os.listdir(layer.fd)))
    return list(names)


def _is_folder(entry: Optional[Entry]) -> bool:
    return entry is not None and entry.kind == "directory"


def _kind(entry: Optional[Entry]) -> str:
    return "gone" if entry is None else f"a {entry.kind}"


def _same(one: Optional[Entry], two: Optional[Entry]) -> bool:
    """Of directories: whether they themselves are the same, whatever they hold."""
    if one is None or two is None:
        return one is two
    return one.kind == two.kind and one.mode == two.mode and same_content(one, two)


def _texts(base: Optional[Entry], ours: Entry, theirs: Entry) -> Optional[Tuple[List[str], List[str], List[str]]]:
    texts = [[] if entry is None else _lines(entry) for entry in (base, ours, theirs)]
    old, mine, others = texts
    return None if old is None or mine is None or others is None else (old, mine, others)


def _lines(entry: Entry) -> Optional[List[str]]:
    if entry.status.st_size > MAX_FILE_BYTES:
        return None
    fd = entry.open()
    try:
        return lines_of(os.read(fd, MAX_FILE_BYTES + 1))
    finally:
        os.close(fd)


def _check_depth(path: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise OSError(errno.ENAMETOOLONG, f"directories nested deeper than {MAX_DEPTH}: {path[:200]}")
