"""Find a formula for noisy data by beam search over live forks, and draw the tree that was searched.

    python examples/tree_search.py [--host URL] [--out tree.svg]

The sandbox holds the data and a model that grows by one feature a level.  Growing it is cheap because the state is
there: each feature is made orthogonal to those before it, once, and a branch goes on from where its parent was.
On each level every sandbox of the beam forks once for each feature that it has not got, all of them are tried side
by side, and the best of all go on.  In the end the root becomes the winner: its model is in the root's memory.

Needs nothing but podflare here, and nothing but Python in the sandbox.
"""

from __future__ import annotations

import argparse
import itertools
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

import podflare
from podflare import Sandbox

VARIABLES = ("a", "b", "c", "d", "e")
BEAM = 2
"""Sandboxes that go on from each level; at least 2, because `explore` merges a single one."""
DEPTH = 4
LEAST_GAIN = 0.002
"""Of R² on rows that the model has not seen; a level that brings less is not worth a feature."""

SETUP = """
import math, random

rng = random.Random(20)
rows = [{name: rng.uniform(-2, 2) for name in "abcde"} for _ in range(400)]
truth = lambda r: 3 * math.sin(r["a"] * r["b"]) + 1.5 * r["c"] ** 2 - 2 * r["d"]     # nothing depends on e
target = [truth(r) + rng.gauss(0, 0.3) for r in rows]
train = 300                                                                          # the rest is for scoring

def dot(u, v):                                                                       # over the training rows only
    return sum(x * y for x, y in zip(u[:train], v[:train]))

basis, model, left = [[1.0] * len(rows)], [], list(target)
mean = dot(left, basis[0]) / train
left = [y - mean for y in left]

def grow(name, feature):
    '''Add one feature: made orthogonal to the basis, then fitted to what is left of the target.'''
    global left
    column = [feature(**r) for r in rows]
    for other in basis:
        share = dot(column, other) / dot(other, other)
        column = [x - share * y for x, y in zip(column, other)]
    weight = dot(left, column) / dot(column, column)
    left = [y - weight * x for y, x in zip(left, column)]
    basis.append(column)
    model.append(name)

def unseen_r2():
    unseen = target[train:]
    middle = sum(unseen) / len(unseen)
    return 1 - sum(y * y for y in left[train:]) / sum((y - middle) ** 2 for y in unseen)
"""
SCORE = "unseen_r2()"


def features() -> list[str]:
    """Every term that a model may be made of, as a Python expression."""
    pairs = [f"{one} * {other}" for one, other in itertools.combinations(VARIABLES, 2)]
    return [*VARIABLES, *(f"{name} ** 2" for name in VARIABLES), *pairs, *(f"math.sin({pair})" for pair in pairs)]


@dataclass(eq=False)
class Node:
    """One model that was tried."""

    feature: str
    score: float
    parent: Node | None = None
    sandbox: Sandbox | None = None
    """While it is in the beam."""
    children: list[Node] = field(default_factory=list)

    def path(self) -> list[str]:
        """Its features, in the order in which they came."""
        return [*(self.parent.path() if self.parent else []), *([self.feature] if self.feature else [])]


def search(root: Sandbox, stack: ExitStack) -> tuple[Node, Node]:
    """The tree and its best node; `root` then is what the best one was.  Sandboxes are left to `stack`."""
    root.run_code(SETUP)
    top = best = Node("", 0.0, sandbox=root)
    beam = [top]
    for _level in range(DEPTH):
        beam = _next_beam(beam, stack)
        if not beam or beam[0].score < best.score + LEAST_GAIN:
            break
        best = beam[0]
    if best.sandbox is not None and best.sandbox is not root:
        root.merge_into(best.sandbox)
    return top, best


def _next_beam(beam: list[Node], stack: ExitStack) -> list[Node]:
    """Try every feature in every sandbox of the beam; the best nodes of all, with their live sandboxes."""
    kept: list[Node] = []
    for node in beam:
        assert node.sandbox is not None
        names = [name for name in features() if name not in node.path()]
        candidates = [f"grow({name!r}, lambda a, b, c, d, e: {name})" for name in names]
        found = podflare.explore(node.sandbox, candidates, SCORE, keep=BEAM)
        for branch in found.branches:
            stack.callback(branch.close)
        nodes = [Node(names[tried.index], tried.score, node) for tried in found.attempts if tried.score is not None]
        node.children = sorted(nodes, key=lambda child: -child.score)
        for child, branch in zip(node.children, found.branches, strict=False):
            child.sandbox = branch
            kept.append(child)
    kept.sort(key=lambda child: -child.score)
    # The same features in another order are the same model: two of them would waste half of the beam.
    distinct = {frozenset(node.path()): node for node in reversed(kept)}
    following = sorted(distinct.values(), key=lambda child: -child.score)[:BEAM]
    for node in kept:
        if node not in following and node.sandbox is not None:
            node.sandbox.close()
            node.sandbox = None
    return following


def draw(top: Node, best: Node) -> str:
    """The tree as SVG: levels from left to right, height is the score, the winner's way is thick."""
    width, height, margin = 920, 560, 60
    winners: set[int] = set()
    node: Node | None = best
    while node is not None:
        winners.add(id(node))
        node = node.parent
    lines, dots, labels = [], [], []

    def place(node: Node, level: int) -> tuple[float, float]:
        x = margin + level * (width - 3 * margin) / DEPTH
        return x, height - margin - max(0.0, node.score) * (height - 2 * margin)

    def walk(node: Node, level: int) -> None:
        x, y = place(node, level)
        won = id(node) in winners
        for child in node.children:
            x2, y2 = place(child, level + 1)
            thick = won and id(child) in winners
            style = 'stroke="#c2410c" stroke-width="3"' if thick else 'stroke="#94a3b8" stroke-width="0.6"'
            lines.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>')
            walk(child, level + 1)
        colour = "#c2410c" if won else "#334155" if node.children else "#94a3b8"
        words = escape(f"{' + '.join(node.path()) or 'mean'}: R² {node.score:.4f}")
        radius = 6 if won else 4 if node.children else 2.5
        dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"><title>{words}</title></circle>')
        if won:
            text = escape(f"{'+ ' if level > 1 else ''}{node.feature or 'mean'}  {node.score:.3f}")
            side = f'x="{x - 9:.1f}" text-anchor="end"' if level else f'x="{x + 9:.1f}"'
            labels.append(f'<text {side} y="{y - 9:.1f}" fill="#7c2d12">{text}</text>')

    walk(top, 0)
    axis = f'<text x="{margin}" y="30" font-weight="bold">R² on unseen rows, one feature more a level</text>'
    shape = f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {shape}>',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            axis,
            *lines,
            *dots,
            *labels,
            "</svg>\n",
        ]
    )


def count(node: Node) -> int:
    """How many models the tree below `node` holds."""
    return len(node.children) + sum(count(child) for child in node.children)


def main() -> None:
    parser = argparse.ArgumentParser(description="Beam search over live forks of a sandbox.")
    parser.add_argument("--host", help="daemon to use; without one a private daemon is started")
    parser.add_argument("--out", type=Path, default=Path("tree_search.svg"), help="where the picture goes")
    options = parser.parse_args()
    started = time.monotonic()
    with ExitStack() as stack:
        root = stack.enter_context(Sandbox(host=options.host))
        top, best = search(root, stack)
        print(f"tried    {count(top)} models in forks of one sandbox, {time.monotonic() - started:.1f} s")
        print(f"found    {' + '.join(best.path())}, R² {best.score:.4f}")
        # The root's own memory has the winner now.
        print(f"in root  {root.run_code('print(sorted(model), round(unseen_r2(), 4))').stdout}")
    options.out.write_text(draw(top, best), encoding="utf-8")
    print(f"picture  {options.out}")


if __name__ == "__main__":
    main()
