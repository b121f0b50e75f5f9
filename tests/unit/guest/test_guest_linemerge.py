"""The merge of texts by lines, for texts that are made up at random, and against git."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podflare.guest.process.linemerge import MAX_FILE_BYTES, lines_of, merge_lines

TEXTS = st.lists(st.sampled_from("abcdef").map(lambda letter: letter + "\n"), max_size=12)


@st.composite
def edited(draw: st.DrawFn, sides: int = 2) -> tuple[list[str], list[list[str]]]:
    """A text of lines that all differ, and versions of it with lines changed, added, removed, each its own way."""
    base = [f"{number}\n" for number in range(draw(st.integers(0, 12)))]
    versions = []
    for side in range(sides):
        version = []
        for number, line in enumerate(base):
            what = draw(st.sampled_from(["keep"] * 6 + ["change", "remove", "add"]))
            if what in ("change", "add"):
                version.append(f"{side} {number}\n")
            if what in ("keep", "add"):
                version.append(line)
        if draw(st.booleans()):
            version.append(f"{side} end\n")
        versions.append(version)
    return base, versions


@given(TEXTS, TEXTS)
def test_one_change_is_taken_as_it_is(base, changed):
    """If only one side changed the text, or both alike, the result is that side's."""
    assert merge_lines(base, changed, base) == changed
    assert merge_lines(base, base, changed) == changed
    assert merge_lines(base, changed, changed) == changed


@given(edited())
def test_both_orders_give_the_same(texts):
    """A merge without conflict does not depend on who merges whom, and neither does a conflict."""
    base, (one, two) = texts
    assert merge_lines(base, one, two) == merge_lines(base, two, one)


@given(edited(3))
def test_three_changes_in_any_order(texts):
    """Merging three versions one after the other gives the same in every order in which it gives anything."""
    base, (one, two, three) = texts
    results = []
    for first, second, third in ((one, two, three), (three, one, two), (two, three, one)):
        half = merge_lines(base, first, second)
        whole = None if half is None else merge_lines(base, half, third)
        if whole is not None:
            results.append(whole)
    assert all(result == results[0] for result in results)


@given(edited())
def test_nothing_is_lost(texts):
    """Every line that a side added is in the result, every line that a side removed is not."""
    base, (one, two) = texts
    merged = merge_lines(base, one, two)
    if merged is not None:
        for side in (one, two):
            assert set(side) - set(base) <= set(merged)
            assert not (set(base) - set(side)) & set(merged)


@given(edited())
def test_a_side_decides_conflicts_and_nothing_else(texts):
    """With a favour there is always a result; without a conflict it is the same; else it has that side's lines."""
    base, (one, two) = texts
    merged = merge_lines(base, one, two)
    ours, theirs = (merge_lines(base, one, two, favour=side) for side in ("ours", "theirs"))
    if merged is not None:
        assert ours == theirs == merged
    else:
        assert ours is not None and theirs is not None and ours != theirs
        assert set(one) - set(base) <= set(ours) and set(two) - set(base) <= set(theirs)


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
@settings(max_examples=30, deadline=None)
@given(edited())
def test_the_same_as_git(tmp_path_factory, texts):
    """The result, or the conflict, is that of `git merge-file` (texts with equal lines can be read in several ways)."""
    base, (one, two) = texts
    folder: Path = tmp_path_factory.mktemp("git")
    for name, lines in (("ours", one), ("base", base), ("theirs", two)):
        (folder / name).write_text("".join(lines))
    done = subprocess.run(
        ["git", "merge-file", "-p", "ours", "base", "theirs"], cwd=folder, capture_output=True, text=True, timeout=20
    )
    merged = merge_lines(base, one, two)
    assert merged == (None if done.returncode else done.stdout.splitlines(keepends=True))


def test_what_is_a_text():
    """UTF-8 without NUL and below the cap; only a newline ends a line, and a last line needs none."""
    assert lines_of("ä\r\nb\u2028c\x0cd\n\ne".encode()) == ["ä\r\n", "b\u2028c\x0cd\n", "\n", "e"]
    assert lines_of(b"") == []
    assert [lines_of(data) for data in (b"\xff", b"a\0", b"a" * (MAX_FILE_BYTES + 1))] == [None] * 3
    assert merge_lines(["a\n", "-\n", "b"], ["a\n", "-\n", "B"], ["A\n", "-\n", "b"]) == ["A\n", "-\n", "B"]
