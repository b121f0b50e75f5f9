"""Random trees and layers, as a directory holds them and as a dict says what they are.

A layer is a dict of names.  File(content, mode), Link(target), Fifo(), WHITEOUT, or Folder(entries, mode, opaque).
Names are what a kernel takes: any bytes but NUL and slash.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import strategies as st

OPAQUE = "user.overlay.opaque"
WHITEOUT = "whiteout"


@dataclass(frozen=True)
class File:
    content: bytes
    mode: int = 0o644


@dataclass(frozen=True)
class Link:
    target: str


@dataclass(frozen=True)
class Fifo:
    mode: int = 0o600


@dataclass(frozen=True)
class Folder:
    entries: dict[str, Any] = field(default_factory=dict)
    mode: int = 0o755
    opaque: bool = False


Node = File | Link | Fifo | Folder | str
Layer = dict[str, Node]

odd = st.binary(min_size=1, max_size=6).filter(lambda raw: not set(raw) & {0, 47} and raw not in (b".", b".."))
names = st.one_of(
    st.sampled_from(["a", "b", "c", " ", "\n", "-rf", "e\u0301", "\udcff\udc80", "__pycache__", "x" * 255]),
    odd.map(os.fsdecode),
)
few_names = st.sampled_from(["a", "b", "\udcff"])
"""Few, so that layers meet."""
modes = st.sampled_from([0o644, 0o755, 0o600, 0o4711, 0o1777])
contents = st.one_of(
    st.binary(max_size=20),
    st.lists(st.sampled_from([b"one\n", b"two\n", b"three\n"]), max_size=5).map(b"".join),
)
links = st.sampled_from(["a", "../..", "/etc/passwd", "\udcfe", "nowhere/at/all"])
leaves: st.SearchStrategy[Node] = st.one_of(
    st.builds(File, contents, modes), st.builds(Link, links), st.builds(Fifo), st.just(WHITEOUT)
)


def layers(of: st.SearchStrategy[str] = few_names, leaf: st.SearchStrategy[Node] = leaves) -> st.SearchStrategy[Layer]:
    folder_modes = st.sampled_from([0o755, 0o700])
    return st.recursive(
        st.dictionaries(of, leaf, max_size=3),
        lambda inner: st.dictionaries(
            of, st.one_of(leaf, st.builds(Folder, inner, folder_modes, st.booleans())), max_size=4
        ),
        max_leaves=10,
    )


def write(folder: str, layer: Layer) -> None:
    """Make the layer in an existing directory."""
    for name, node in layer.items():
        path = os.path.join(folder, name)
        if isinstance(node, Folder):
            os.mkdir(path)
            write(path, node.entries)
            if node.opaque:
                os.setxattr(path, OPAQUE, b"y")
            os.chmod(path, node.mode)
        elif isinstance(node, File):
            with open(path, "wb") as file:
                file.write(node.content)
            os.chmod(path, node.mode)
        elif isinstance(node, Link):
            os.symlink(node.target, path)
        elif isinstance(node, Fifo):
            os.mkfifo(path, node.mode)
        else:
            os.mknod(path, stat.S_IFCHR | 0o600, 0)


def read(folder: str) -> Layer:
    """The layer that a directory is."""
    found: Layer = {}
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            continue  # an overlay lists the whiteouts of a directory that one layer alone has
        mode = stat.S_IMODE(status.st_mode)
        if stat.S_ISDIR(status.st_mode):
            found[name] = Folder(read(path), mode, OPAQUE in os.listxattr(path))
        elif stat.S_ISREG(status.st_mode):
            with open(path, "rb") as file:
                found[name] = File(file.read(), mode)
        elif stat.S_ISLNK(status.st_mode):
            found[name] = Link(os.readlink(path))
        elif stat.S_ISFIFO(status.st_mode):
            found[name] = Fifo(mode)
        else:
            found[name] = WHITEOUT
    return found


def shown(stack: list[Layer]) -> Layer:
    """What overlayfs shows of layers, topmost first (kernel docs, overlayfs)."""
    found: Layer = {}
    for name in {name for layer in stack for name in layer}:
        folders: list[Folder] = []
        for layer in stack:
            node = layer.get(name)
            if node is None:
                continue
            if not isinstance(node, Folder):
                if not folders and node != WHITEOUT:
                    found[name] = node
                break
            folders.append(node)
            if node.opaque:
                break
        if folders:
            found[name] = Folder(shown([one.entries for one in folders]), folders[0].mode)
    return found


def paths(layer: Layer, above: str = "") -> Iterator[tuple[str, Node]]:
    """Every path of what is shown."""
    for name, node in layer.items():
        yield f"{above}/{name}", node
        if isinstance(node, Folder):
            yield from paths(node.entries, f"{above}/{name}")


@contextmanager
def directories(*layers: Layer) -> Iterator[list[str]]:
    """Each layer in a directory of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        made = [os.path.join(temporary, str(number)) for number in range(len(layers))]
        for folder, layer in zip(made, layers, strict=True):
            os.mkdir(folder, 0o755)
            write(folder, layer)
        yield made


def need_marks() -> None:
    """Skip where the temporary directory takes none of overlayfs's marks."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.setxattr(folder, OPAQUE, b"y")
            os.mknod(f"{folder}/w", stat.S_IFCHR | 0o600, 0)
        except OSError as exc:
            pytest.skip(f"the temporary directory takes no overlay marks: {exc}")
