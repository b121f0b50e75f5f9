"""What has to be brought into a virtual machine so that a three-way merge can be planned in it.  Pure.

Three lists of files say what two machines were when they were last one (base), and what they are (ours, theirs).  Two
layers are made of them, as overlayfs has them: laid over our own files, the first shows the base's wherever theirs
changed something, and the second, over the first, shows theirs.  Where a file of ours has the base's mark nobody has
written to it, and neither layer needs it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from podflare.engines.microvm.diff import Entry, alike
from podflare.wire.paths import IDENTITY

Rows = Mapping[str, Entry]
LayerRows = Mapping[str, Entry | None]
"""None hides what is below.  A directory's row comes before those of what is in it."""


@dataclass(frozen=True)
class Trio:
    """The two layers, and what they rest on."""

    base: LayerRows
    theirs: LayerRows
    unchanged: Mapping[str, str]
    """Files of ours that stand for the base's, too, with their marks."""


def hiding(layer: LayerRows) -> set[str]:
    """The paths below which a layer shows nothing that lies under it, as it has no directory there."""
    return {path for path, entry in layer.items() if entry is None or entry.kind != "directory"}


def overlaid(base: Rows, layer: LayerRows, hides: Iterable[str] = ()) -> dict[str, Entry]:
    """What is shown of `base` with a layer over it.  Args: hides: directories of the layer that hide what is below."""
    hidden = {*hiding(layer), *hides}
    shown = {path: entry for path, entry in base.items() if path not in layer and not below_any(path, hidden)}
    shown.update((path, entry) for path, entry in layer.items() if entry is not None)
    return shown


def changed(base: Rows, theirs: Rows) -> tuple[list[str], list[str]]:
    """Paths that theirs has otherwise or anew, as far as marks tell; and those that it has no more."""
    other = [
        path
        for path, entry in theirs.items()
        if path not in IDENTITY and path != "/" and ((old := base.get(path)) is None or not alike(old, entry))
    ]
    return other, [path for path in base if path not in theirs and path not in IDENTITY]


def trio(base: Rows, ours: Rows, theirs: Rows, touched: tuple[Iterable[str], Iterable[str]]) -> Trio:
    """Args: touched: as `changed` gives them, perhaps less what turned out to be the same."""
    other, gone = touched
    top: dict[str, Entry | None] = {path: theirs[path] for path in other}
    for path in gone:
        above = _parent(path)
        if above not in base or ((now := theirs.get(above)) is not None and now.kind == "directory"):
            top[path] = None
    _with_parents(top, theirs)
    middle, unchanged = _middle(base, ours, theirs, {*other, *gone})
    return Trio(middle, _ordered(top), unchanged)


def _middle(base: Rows, ours: Rows, theirs: Rows, touched: set[str]) -> tuple[LayerRows, dict[str, str]]:
    """What makes ours the base's wherever theirs changed something, or took away or replaced a directory with all
    that is in it; and the files of ours that are the base's."""
    looked_at = {*touched, *(above for path in touched for above in _parents(path) if above in base or above in ours)}
    whole = {
        path
        for path in looked_at
        if _is_folder(base, path) and not (_is_folder(theirs, path) and _is_folder(ours, path))
    }
    if whole:
        looked_at.update(path for rows in (base, ours) for path in rows if below_any(path, whole))
    middle: dict[str, Entry | None] = {}
    unchanged: dict[str, str] = {}
    for path in sorted(looked_at):
        was, now = base.get(path), ours.get(path)
        if was is None:
            # What lies in a directory that the base has not is hidden with that.
            if now is not None and not any(above in ours and not _is_folder(base, above) for above in _parents(path)):
                middle[path] = None
        elif now is None or not alike(was, now):
            middle[path] = was
        elif was.kind == "file":
            unchanged[path] = now.mark
    _with_parents(middle, base)
    return _ordered(middle), unchanged


def _with_parents(layer: dict[str, Entry | None], rows: Rows) -> None:
    for path in list(layer):
        for above in _parents(path):
            if above not in layer and _is_folder(rows, above):
                layer[above] = rows[above]


def _ordered(layer: LayerRows) -> LayerRows:
    return {path: layer[path] for path in sorted(layer) if path != "/"}


def _is_folder(rows: Rows, path: str) -> bool:
    entry = rows.get(path)
    return entry is not None and entry.kind == "directory"


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def _parents(path: str) -> Iterable[str]:
    while path := path.rpartition("/")[0]:
        yield path


def below_any(path: str, folders: Container[str]) -> bool:
    """Whether one of the directories that a path lies in is among these."""
    return any(above in folders for above in _parents(path))
