"""guest/process/capture.merge_below: many overlay layers become one that shows the same."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podflare.guest.process.capture import merge_below

OPAQUE = "user.overlay.opaque"

# A layer: name -> "text" (file), None (whiteout), or (opaque, layer) for a directory.
names = st.sampled_from(["a", "b", "c"])
leaves = st.one_of(st.none(), st.text("xyz", max_size=2))
layers = st.recursive(
    st.dictionaries(names, leaves, max_size=3),
    lambda inner: st.dictionaries(names, st.one_of(leaves, st.tuples(st.booleans(), inner)), max_size=3),
    max_leaves=8,
)


def write(folder: Path, layer: dict) -> None:
    for name, entry in layer.items():
        path = folder / name
        if entry is None:
            os.mknod(path, stat.S_IFCHR | 0o600, 0)
        elif isinstance(entry, str):
            path.write_text(entry)
        else:
            path.mkdir()
            write(path, entry[1])
            if entry[0]:
                os.setxattr(path, OPAQUE, b"y")


def read(folder: Path) -> dict:
    found: dict = {}
    for path in folder.iterdir():
        status = path.lstat()
        if stat.S_ISCHR(status.st_mode):
            found[path.name] = None
        elif path.is_dir():
            found[path.name] = (OPAQUE in os.listxattr(path), read(path))
        else:
            found[path.name] = path.read_text()
    return found


def shown(stack: list[dict]) -> dict:
    """What overlayfs shows of layers, topmost first (kernel docs, overlayfs)."""
    result: dict = {}
    for name in {name for layer in stack for name in layer}:
        folders: list[dict] = []
        for layer in stack:
            if name not in layer:
                continue
            entry = layer[name]
            if not isinstance(entry, tuple):
                if not folders and entry is not None:
                    result[name] = entry
                break
            folders.append(entry[1])
            if entry[0]:
                break
        if folders:
            result[name] = shown(folders)
    return result


@pytest.fixture(scope="module")
def marks() -> None:
    """Skip where the temporary directory takes none of overlayfs's marks."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.setxattr(folder, OPAQUE, b"y")
            os.mknod(f"{folder}/w", stat.S_IFCHR | 0o600, 0)
        except OSError as exc:
            pytest.skip(f"the temporary directory takes no overlay marks: {exc}")


@settings(max_examples=150, deadline=None)
@given(st.lists(layers, min_size=2, max_size=4), layers)
def test_the_merged_layer_shows_what_the_stack_showed(marks: None, stack: list[dict], template: dict) -> None:
    """Over any template, and without a copy of any file's content."""
    with tempfile.TemporaryDirectory() as temporary:
        for number, layer in enumerate(stack):
            folder = Path(temporary, str(number))
            folder.mkdir()
            write(folder, layer)
        target = os.open(Path(temporary, "0"), os.O_RDONLY | os.O_DIRECTORY)
        try:
            for number in range(1, len(stack)):
                source = os.open(Path(temporary, str(number)), os.O_RDONLY | os.O_DIRECTORY)
                try:
                    merge_below(source, target, 0)
                finally:
                    os.close(source)
        finally:
            os.close(target)
        merged = read(Path(temporary, "0"))
        assert shown([merged, template]) == shown([*stack, template])
        inodes = {path.stat().st_ino for path in Path(temporary).rglob("*") if path.is_file()}
        written = sum(1 for number in range(len(stack)) for _ in files(stack[number]))
        assert len(inodes) == written


def files(layer: dict):
    for entry in layer.values():
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, tuple):
            yield from files(entry[1])
