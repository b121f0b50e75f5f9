"""Fuzz harness for what is brought into a virtual machine for a merge to be planned there (engines/microvm/trio.py).

Invariant: over any three trees, a plan that is made with the two layers and our own files is the same as one that is
made with all of the three, and each decision leads to the same files.
"""

from __future__ import annotations

from typing import Any

import pytest
import trees
from fuzzing import tries
from hypothesis import example, given
from hypothesis import strategies as st
from test_layers import _at, _carried_out, _put, opened
from trees import WHITEOUT, Fifo, File, Folder, Layer, Link, Node, directories, shown

from podflare.engines.microvm.diff import Entry
from podflare.engines.microvm.trio import LayerRows, changed, hiding, overlaid, trio
from podflare.guest.process.threeway import ThreeWay

leaves = st.one_of(st.builds(File, trees.contents, trees.modes), st.builds(Link, trees.links), st.just(WHITEOUT))
layers = trees.layers(leaf=leaves)


@pytest.fixture(scope="module", autouse=True)
def marks() -> None:
    trees.need_marks()


def rows(stack: list[Layer]) -> dict[str, Entry]:
    """As a machine lists them (guest/vm/manifest.py): a file that nobody has written to has the mark that it had."""
    found = {}
    for path, node in trees.paths(shown(stack)):
        if isinstance(node, Folder):
            found[path] = Entry("directory", node.mode, -1, "")
        elif isinstance(node, File):
            written = next(number for number, layer in enumerate(reversed(stack)) if _at(layer, path) == node)
            own = len(stack) > 1 and _at(stack[0], path) is not None
            found[path] = Entry("file", node.mode, len(node.content), f"{id(stack[0]) if own else written}")
        elif isinstance(node, Link):
            found[path] = Entry("link", 0o777, len(node.target), node.target)
        else:
            assert isinstance(node, Fifo)
            found[path] = Entry("fifo", node.mode, -1, "")
    return found


def made(layer: LayerRows, tree: Layer) -> Layer:
    """The layer that stands in the machine, with contents from the tree that it was made of."""
    found: Layer = {}
    for path, row in layer.items():
        for above in _above(path):
            if _at(found, above) is None:
                _put(found, above, Folder({}))
        node: Node | None = WHITEOUT
        if row is not None:
            node = _at(tree, path)
            node = Folder({}, row.mode) if isinstance(node, Folder) else node
        _put(found, path, node)
    return found


def _above(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:end]) for end in range(2, len(parts))]


def planned(base: list[str], ours: list[str], theirs: list[str], empty: str) -> ThreeWay:
    merge = ThreeWay(base, ours, theirs)
    with opened(base, base, empty) as one, opened(ours, ours, empty) as two, opened(theirs, theirs, empty) as three:
        merge._folders((one, two, three), "", 0)
    return merge


def told(merge: ThreeWay) -> list[Any]:
    """What there is to be said of a plan, but for places at which nothing is to be done."""
    return sorted(
        (unit.path, unit.why, sorted(unit.paths), unit.sides, unit.if_ours is not None)
        for unit in merge.units
        if unit.why or unit.action is not None
    )


def outcome(merge: ThreeWay, ours: list[Layer], theirs: list[Layer], side: str) -> Layer:
    tree, other = shown(ours), shown(theirs)
    for unit in merge.units:
        action = unit.action
        if unit.why:
            action = unit.if_theirs if side == "theirs" else unit.if_ours
        if action is not None:
            _carried_out(action, tree, other)
    return tree


GROWN: Layer = {"a": Folder({"x": File(b"1"), "y": File(b"2"), "d": Folder({"z": File(b"3")})})}


@tries(60)
@given(layers, layers, layers, st.booleans())
@example(GROWN, {"a": WHITEOUT}, {"a": Folder({"x": File(b"4")})}, False)
@example(GROWN, {"a": File(b"5")}, {"a": Folder({"d": Folder({"n": File(b"4")})})}, False)
@example(GROWN, {"a": Folder({"n": File(b"4")})}, {"a": WHITEOUT}, False)
@example(GROWN, {"a": Folder({"d": Folder({"z": WHITEOUT, "n": File(b"4")})})}, {"a": Link("b")}, False)
@example(GROWN, {"a": Folder({"y": File(b"6")})}, {"a": Folder({"q": File(b"7")}, opaque=True)}, False)
@example({}, {"a": Folder({"n": File(b"4")})}, {"a": Folder({"d": Folder({"m": File(b"4")})})}, False)
def test_a_plan_with_what_is_brought_is_the_same(base: Layer, mine: Layer, their: Layer, parent: bool) -> None:
    """The same conflicts, the same paths, the same files whatever is decided; with the parent or a sibling as ours."""
    if parent:
        mine = {}
    was, ours, theirs = rows([base]), rows([mine, base]), rows([their, base])
    found = trio(was, ours, theirs, changed(was, theirs))
    middle, top = made(found.base, shown([base])), made(found.theirs, shown([their, base]))
    with directories(base, mine, their, middle, top, {}) as (bottom, first, second, between, above, empty):
        full = planned([bottom], [first, bottom], [second, bottom], empty)
        small = planned([between, first, bottom], [first, bottom], [above, between, first, bottom], empty)
    assert told(small) == told(full)
    for side in ("ours", "theirs"):
        reached = outcome(small, [mine, base], [top, middle, mine, base], side)
        assert reached == outcome(full, [mine, base], [their, base], side)


@tries(60)
@given(layers, layers, layers)
def test_what_came_over_is_the_next_base(base: Layer, then: Layer, now: Layer) -> None:
    """What theirs had at a merge, laid over the base, is their list of then; also once more over that."""
    stacks = [[base], [then, base], [now, then, base]]
    was, at_first, at_last = (rows(stack) for stack in stacks)
    first = trio(was, was, at_first, changed(was, at_first)).theirs
    assert overlaid(was, first) == at_first
    second = trio(at_first, at_first, at_last, changed(at_first, at_last)).theirs
    assert overlaid(overlaid(was, first), second) == at_last
    # Both as one, as they are kept.
    hidden = hiding(second)
    both = {path: row for path, row in first.items() if not hidden & {*_above(path)}} | dict(second)
    assert overlaid(was, both, hiding(first)) == at_last
