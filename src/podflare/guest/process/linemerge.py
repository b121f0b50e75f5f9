"""Merges two changes of one text by lines (diff3).  Pure; what is compared may be such that it takes minutes.

As in git, changes of both that touch each other are one conflict, and equal changes are one change.
"""

from __future__ import annotations

import difflib
import io
from typing import Iterator, List, Optional, Sequence, Tuple

MAX_FILE_BYTES = 1 << 20
Lines = Sequence[str]
_Range = Tuple[int, int, int, int, int, int]


def lines_of(data: bytes) -> Optional[List[str]]:
    """The lines of a text, each with its end; None for what is no text: not UTF-8, with NUL, or too large."""
    if len(data) > MAX_FILE_BYTES or b"\0" in data:
        return None
    try:
        # Not splitlines: only a newline ends a line here.
        return io.StringIO(data.decode("utf-8"), newline="\n").readlines()
    except UnicodeDecodeError:
        return None


def merge_lines(base: Lines, ours: Lines, theirs: Lines, favour: str = "") -> Optional[List[str]]:
    """The text with both changes; None if they conflict.

    Args: favour: "ours" or "theirs" decides conflicts, and those lines only.
    """
    merged: List[str] = []
    for low, high, our_low, our_high, their_low, their_high in _regions(base, ours, theirs):
        old, mine, others = base[low:high], ours[our_low:our_high], theirs[their_low:their_high]
        if others == old or mine == others:
            merged += mine
        elif mine == old:
            merged += others
        elif favour:
            merged += mine if favour == "ours" else others
        else:
            return None
    return merged


def _regions(base: Lines, ours: Lines, theirs: Lines) -> Iterator[_Range]:
    """Ranges of the three that belong together, in order: by turns what all have alike, and what lies between."""
    done = (0, 0, 0)
    for low, mine, others, count in _alike(base, ours, theirs):
        if (low, mine, others) != done:
            yield done[0], low, done[1], mine, done[2], others
        if count:
            yield low, low + count, mine, mine + count, others, others + count
        done = (low + count, mine + count, others + count)


def _alike(base: Lines, ours: Lines, theirs: Lines) -> Iterator[Tuple[int, int, int, int]]:
    """(place in base, in ours, in theirs, length) of what both others still have of the base; at last the ends."""
    our_blocks, their_blocks = _blocks(base, ours), _blocks(base, theirs)
    i = j = 0
    while i < len(our_blocks) and j < len(their_blocks):
        our_base, our_place, our_count = our_blocks[i]
        their_base, their_place, their_count = their_blocks[j]
        low = max(our_base, their_base)
        high = min(our_base + our_count, their_base + their_count)
        if low < high:
            yield low, our_place + low - our_base, their_place + low - their_base, high - low
        if our_base + our_count < their_base + their_count:
            i += 1
        else:
            j += 1
    yield len(base), len(ours), len(theirs), 0


def _blocks(old: Lines, new: Lines) -> List[Tuple[int, int, int]]:
    """Stretches that two texts have alike.  The equal beginning and end, most of the text, cost next to nothing."""
    start, shorter = 0, min(len(old), len(new))
    while start < shorter and old[start] == new[start]:
        start += 1
    end = 0
    while end < shorter - start and old[-1 - end] == new[-1 - end]:
        end += 1
    middle = difflib.SequenceMatcher(
        None, old[start : len(old) - end], new[start : len(new) - end], autojunk=False
    ).get_matching_blocks()
    blocks = [(start + a, start + b, size) for a, b, size in middle if size]
    return [(0, 0, start), *blocks, (len(old) - end, len(new) - end, end)]
