"""guest/process/memory.py: the plan by which one process's memory becomes another's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podflare.guest.process.memory import KEEP, MAP, PROTECT, UNMAP, Region, _without, parse_maps, plan_steps

PAGE = 4096


@st.composite
def address_spaces(draw: st.DrawFn) -> list[Region]:
    """Some regions, in order, of a few files and of none."""
    found, address = [], 0
    for _ in range(draw(st.integers(0, 8))):
        address += draw(st.integers(0, 3)) * PAGE
        length = draw(st.integers(1, 4)) * PAGE
        inode = draw(st.sampled_from([0, 0, 7, 8]))
        flags = draw(st.sampled_from(["rw-p", "r--p", "r-xp", "rw-s"]))
        offset = draw(st.integers(0, 3)) * PAGE if inode else 0
        found.append(Region(address, address + length, flags, offset, "08:01", inode, ""))
        address += length
    return found


def pages(regions: list[Region]) -> dict[int, tuple[object, str]]:
    return {at: (r.backing_at(at), r.flags) for r in regions for at in range(r.start, r.end, PAGE)}


@given(address_spaces(), address_spaces())
def test_after_the_steps_exactly_the_sources_pages_are_mapped(source: list[Region], target: list[Region]) -> None:
    """Every page of the source is there with its protection, no other page is, and nothing shared is kept."""
    wanted, found = pages(source), pages(target)
    result = dict(found)
    for step in plan_steps(source, target):
        for at in range(step.start, step.end, PAGE):
            if step.kind == UNMAP:
                assert at not in wanted
                del result[at]
            elif step.kind in (KEEP, PROTECT):
                assert found[at][0] == wanted[at][0] and found[at][1][3] == wanted[at][1][3] == "p"
                assert step.kind == PROTECT or found[at] == wanted[at]
                result[at] = wanted[at]
            else:
                assert step.kind == MAP
                result[at] = wanted[at]
            if step.kind != UNMAP:
                letters = wanted[at][1]
                assert step.protection == sum(
                    bit for bit, letter in ((1, "r"), (2, "w"), (4, "x")) if letter in letters[:3]
                )
    assert result == wanted


def test_other_ancestors_are_refused() -> None:
    """Two processes in which the kernel's own mappings lie elsewhere cannot become one another."""
    one, two = (Region(at, at + PAGE, "r-xp", 0, "00:00", 0, "[vdso]") for at in (PAGE, 9 * PAGE))
    with pytest.raises(OSError, match="ancestor"):
        plan_steps([one], [two])


def test_lines_of_maps_are_read() -> None:
    """Names with spaces, no name and the kernel's names."""
    text = (
        "00400000-00401000 r-xp 00001000 08:01 42                         /usr/bin/a b (deleted)\n"
        "7ffe0000-7fff0000 rw-p 00000000 00:00 0                          [stack]\n"
        "7fff1000-7fff2000 rw-s 00000000 00:01 9 \n"
    )
    first, second, third = parse_maps(text)
    assert (first.start, first.end, first.offset, first.inode) == (0x400000, 0x401000, 0x1000, 42)
    assert first.name == "/usr/bin/a b (deleted)" and first.protection == 5
    assert second.name == "[stack]" and not second.of_kernel and third.name == "" and third.flags == "rw-s"


runs = st.lists(st.integers(0, 40), unique=True).map(
    lambda edges: list(zip(sorted(edges)[::2], sorted(edges)[1::2], strict=False))
)


@given(runs, runs)
def test_what_no_run_covers(mine: list[tuple[int, int]], taken: list[tuple[int, int]]) -> None:
    """The difference of two sets of runs has exactly the points that only the first has."""

    def points(some: list[tuple[int, int]]) -> set[int]:
        return {at for start, end in some for at in range(start, end)}

    assert points(_without(mine, taken)) == points(mine) - points(taken)
