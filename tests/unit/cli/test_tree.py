"""The order and the lines of `podflare tree`, without a daemon."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from podflare.cli.tree import _GUIDES, _branch, in_order
from podflare.client._calls import parse_info
from podflare.wire.api import SandboxInfo


def infos(parents: dict[str, str | None]) -> list[SandboxInfo]:
    return [parse_info({"id": name, "parent_id": parent}) for name, parent in parents.items()]


def test_drawn_as_a_tree() -> None:
    """Forks stand below their parent, brothers side by side, one whose parent is gone at the left."""
    nodes = in_order(infos({"a": None, "b": "a", "c": "a", "d": "b", "e": "d", "x": "gone", "y": "x"}))
    assert [_branch(last, _GUIDES) + info.id for info, last in nodes] == [
        "a",
        "├── b",
        "│   └── d",
        "│       └── e",
        "└── c",
        "x",
        "└── y",
    ]


@given(st.lists(st.integers(-1, 12), max_size=12))
def test_whatever_the_daemon_says_each_sandbox_is_shown_once(parents: list[int]) -> None:
    """Parents that are missing, come later or run in a circle hide no sandbox and end no program."""
    told = infos({str(index): None if parent < 0 else str(parent) for index, parent in enumerate(parents)})
    shown = [info.id for info, _ in in_order(told)]
    assert sorted(shown) == sorted(info.id for info in told)


def test_a_deep_tree_needs_no_deep_stack() -> None:
    """Thousands of generations are walked."""
    chain = infos({str(n): str(n - 1) if n else None for n in range(3000)})
    assert [len(last) for _, last in in_order(chain)] == list(range(3000))
