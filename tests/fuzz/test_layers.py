"""Fuzz harness for the code that copies, compares and merges files of sandboxes: guest/process/capture.py, compare.py,
threeway.py.

Invariant: over any trees (odd names, whiteouts, opaque directories, links, modes) they see what overlayfs shows; a copy
is the same, a comparison names exactly the paths that differ, and a merge that meets no conflict gives what both
changed, whichever of the two gets it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import trees
from fuzzing import tries
from hypothesis import assume, given
from hypothesis import strategies as st
from trees import WHITEOUT, Fifo, File, Folder, Layer, Link, Node, directories, names, read, shown

from podflare.guest.process.capture import MAX_DEPTH, capture_layers
from podflare.guest.process.compare import Comparison, resolve
from podflare.guest.process.compare import Layer as Opened
from podflare.guest.process.room import Room
from podflare.guest.process.threeway import Action, ThreeWay

_OPEN = os.O_RDONLY | os.O_DIRECTORY
in_a_template = st.one_of(st.builds(File, trees.contents), st.builds(Link, trees.links))
"""A template's directories are no layers: they hold none of overlayfs's marks."""
deep = st.integers(1, 30).map(lambda depth: _nested(depth))


def _nested(depth: int) -> Layer:
    layer: Layer = {"leaf": File(b"deep")}
    for _ in range(depth):
        layer = {"d": Folder(layer)}
    return layer


@pytest.fixture(scope="module", autouse=True)
def marks() -> None:
    trees.need_marks()


@contextmanager
def opened(folders: Sequence[str], chain: Sequence[str], template: str) -> Iterator[list[Opened]]:
    """A stack as compare.open_stack makes it, over directories that the test chooses."""
    with ExitStack() as stack:
        made = []
        for name, folder in (*zip(chain, folders, strict=True), ("", template)):
            fd = os.open(folder, _OPEN)
            stack.callback(os.close, fd)
            made.append(Opened(name, fd, template=not name))
        yield made


@tries(40)
@given(st.one_of(trees.layers(names), deep))
def test_a_capture_is_the_same(layer: Layer) -> None:
    """Every entry with its kind, mode, content and marks; hard links stay one file, sockets are left out."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/machine/root/upper", f"{folder}/layer"
        os.makedirs(source)
        trees.write(source, layer)
        first = next((f"{source}{path}" for path, node in trees.paths(layer) if isinstance(node, File)), None)
        if first is not None:
            os.link(first, f"{source}/.link")
        listener = socket.socket(socket.AF_UNIX)
        with listener:
            listener.bind(f"{source}/.socket")
            os.mkdir(target)
            capture_layers(f"{folder}/machine", target, Room(10**6, 10**9))
        copied = read(f"{target}/root/upper")
        if first is not None:
            other = f"{target}/root/upper{first.removeprefix(source)}"
            assert os.lstat(f"{target}/root/upper/.link").st_ino == os.lstat(other).st_ino
            del copied[".link"]
        assert copied == layer


def test_a_chain_that_is_too_deep_is_refused() -> None:
    """The depth at which a copy would run out of descriptors is an error, at once."""
    with tempfile.TemporaryDirectory() as folder:
        os.makedirs(f"{folder}/machine/root/upper/" + "d/" * (MAX_DEPTH + 3))
        os.mkdir(f"{folder}/layer")
        with pytest.raises(OSError, match="nested deeper"):
            capture_layers(f"{folder}/machine", f"{folder}/layer", Room(10**6, 10**9))


@tries(60)
@given(trees.layers(), trees.layers(), st.lists(trees.layers(), max_size=2), trees.layers(leaf=in_a_template))
def test_a_comparison_names_what_differs(one: Layer, two: Layer, common: list[Layer], template: Layer) -> None:
    """Two machines over shared layers: added, removed and modified are those of the two trees that are shown."""
    with directories(one, two, *common, template) as (first, second, *below, bottom):
        shared = [f"l{number}" for number in range(len(common))]
        with opened([first, *below], ["m1", *shared], bottom) as before:
            with opened([second, *below], ["m2", *shared], bottom) as after:
                found = Comparison(["m1", *shared], ["m2", *shared], lambda *_: None)
                found._directories(before, after, "", 0)
    old, new = (dict(trees.paths(shown([layer, *common, template]))) for layer in (one, two))
    assert sorted(found.added) == sorted(new.keys() - old.keys())
    assert sorted(found.removed) == sorted(old.keys() - new.keys())
    assert sorted(found.modified) == sorted(path for path in old.keys() & new.keys() if _differ(old[path], new[path]))


def _differ(one: Node, two: Node) -> bool:
    """Of what is in directories each path speaks for itself."""
    if isinstance(one, Folder) and isinstance(two, Folder):
        return one.mode != two.mode
    return one != two


# Merging.  The model carries a plan's actions out on dicts.

plain = st.one_of(st.builds(File, trees.contents), st.builds(Link, trees.links), st.just(WHITEOUT))


def _plan(base: list[str], ours: list[str], theirs: list[str], bottom: str) -> ThreeWay:
    """Args: directories of the layers that each has, topmost first."""
    merge = ThreeWay(base, ours, theirs)
    with opened(base, base, bottom) as one, opened(ours, ours, bottom) as two, opened(theirs, theirs, bottom) as three:
        merge._folders((one, two, three), "", 0)
    return merge


def _carried_out(action: Action, ours: Layer, theirs: Layer) -> None:
    for path, _ in action.removals:
        _put(ours, path, None)
    node = _at(theirs, action.path) if action.take else _at(ours, action.path)
    if action.content is not None:
        assert isinstance(node, File)
        node = File(action.content, node.mode)
    if action.mode is not None:
        assert isinstance(node, File | Folder)
        node = File(node.content, action.mode) if isinstance(node, File) else Folder(node.entries, action.mode)
    _put(ours, action.path, node)


def _at(layer: Layer, path: str) -> Node | None:
    *above, name = path[1:].split("/")
    for part in above:
        folder = layer.get(part)
        if not isinstance(folder, Folder):
            return None
        layer = folder.entries
    return layer.get(name)


def _put(layer: Layer, path: str, node: Node | None) -> None:
    *above, name = path[1:].split("/")
    for part in above:
        folder = layer[part]
        assert isinstance(folder, Folder)
        layer = folder.entries
    if node is None:
        layer.pop(name, None)
    else:
        layer[name] = node


def _merged(merge: ThreeWay, ours: list[Layer], theirs: list[Layer]) -> Layer:
    tree, other = shown(ours), shown(theirs)
    for unit in merge.units:
        assert not unit.why
        if unit.action is not None:
            _carried_out(unit.action, tree, other)
    return tree


@tries(60)
@given(trees.layers(leaf=plain), trees.layers(leaf=plain), trees.layers(leaf=plain))
def test_a_merge_without_conflicts_is_the_same_both_ways(base: Layer, mine: Layer, their: Layer) -> None:
    """Both directions agree on whether there is a conflict; without one both give the same tree, and what only one
    side changed is as that side has it."""
    with directories(base, mine, their, {}) as (bottom, first, second, empty):
        there, back = (
            _plan([bottom], [one, bottom], [other, bottom], empty) for one, other in ((first, second), (second, first))
        )
    stacks = [mine, base], [their, base]
    conflicts = [[unit.path for unit in merge.units if unit.why] for merge in (there, back)]
    assert bool(conflicts[0]) == bool(conflicts[1])
    assume(not conflicts[0])
    result = _merged(there, *stacks)
    assert result == _merged(back, *reversed(stacks))
    was, one, two = (dict(trees.paths(shown(stack))) for stack in ([base], *stacks))
    now = dict(trees.paths(result))
    for path in was.keys() | one.keys() | two.keys():
        if "__pycache__" in path:
            continue
        old, ours, theirs = (_alone(tree.get(path)) for tree in (was, one, two))
        if ours == theirs:
            assert _alone(now.get(path)) == ours, path
        elif old == ours and not isinstance(old, Folder):
            assert _alone(now.get(path)) == theirs, path
        elif old == theirs and not isinstance(old, Folder):
            assert _alone(now.get(path)) == ours, path


def _alone(node: Node | None) -> Node | None:
    return Folder({}, node.mode) if isinstance(node, Folder) else node


@tries(30)
@given(trees.layers(leaf=plain), trees.layers(leaf=plain))
def test_a_merge_into_what_did_not_change_is_the_other_side(base: Layer, their: Layer) -> None:
    """No conflict and their tree; and the other way round there is nothing to do."""
    with directories(base, {}, their, {}) as (bottom, first, second, empty):
        there = _plan([bottom], [first, bottom], [second, bottom], empty)
        back = _plan([bottom], [second, bottom], [first, bottom], empty)
    assert _merged(there, [base], [their, base]) == shown([their, base])
    assert all(unit.action is None and not unit.why for unit in back.units)


SHOW = """
import sys; sys.path[:0] = sys.argv[1].split(":")
import trees; print(repr(trees.read(sys.argv[2])))
"""


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="only root mounts here")
@tries(3)
@given(st.lists(trees.layers(), min_size=2, max_size=3))
def test_a_stack_is_what_the_kernel_shows(stack: list[Layer]) -> None:
    """What compare.resolve finds of layers, and what the model here says, is what an overlay mount of them shows."""
    with directories(*stack, {}) as (*folders, bottom):
        mounted = f"{os.path.dirname(bottom)}/mounted"
        os.mkdir(mounted)
        lower = ":".join((*folders, bottom))
        command = f'mount -t overlay o -o userxattr,lowerdir="{lower}" "{mounted}" && exec "$@"'
        folder = str(Path(__file__).parent)
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", command, "sh", sys.executable, "-c", SHOW, f"{folder}", mounted],
            capture_output=True, text=True, errors="surrogateescape",
        )  # fmt: skip
        if done.returncode and done.stderr.startswith("mount:"):
            pytest.skip(f"no overlay here: {done.stderr}")
        assert done.returncode == 0, done.stderr
        kernels = eval(done.stdout, {name: getattr(trees, name) for name in ("Folder", "File", "Link", "Fifo")})
        with opened(folders, [f"l{number}" for number in range(len(folders))], bottom) as opened_stack:
            found = _resolved(opened_stack)
    assert found == kernels == shown([*stack, {}])


def _resolved(stack: Sequence[Opened]) -> Layer:
    found: Layer = {}
    for name in {name for layer in stack for name in os.listdir(layer.fd)}:
        entry = resolve(stack, name)
        if entry is None:
            continue
        try:
            if entry.kind == "directory":
                found[name] = Folder(_resolved(entry.folders), entry.mode)
            elif entry.kind == "file":
                with os.fdopen(entry.open(), "rb") as file:
                    found[name] = File(file.read(), entry.mode)
            else:
                found[name] = Link(entry.target()) if entry.kind == "link" else Fifo(entry.mode)
        finally:
            entry.close()
    return found
