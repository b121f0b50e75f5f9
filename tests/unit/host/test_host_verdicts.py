"""Promise: a variable's change is told by its side, never guessed, and a merge moves the base on by what it settled."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from podflare.host.verdicts import Pair, Verdict, told_differences
from podflare.wire.variables import Variable, VariablesTable

NAMES = ("a", "b", "c")
PRINTS = [digit * 32 for digit in "0123"]
CONTENT = st.none() | st.sampled_from(PRINTS)
STATES = st.fixed_dictionaries(dict.fromkeys(NAMES, CONTENT))


def table(state: dict[str, str | None]) -> VariablesTable:
    return VariablesTable({name: Variable("int", 1, content) for name, content in state.items() if content is not None})


def pair(
    ours: dict[str, str | None], theirs: dict[str, str | None], base: dict[str, str | None], *, complete: bool = True
) -> Pair:
    known = {name: content for name, content in base.items() if content is not None}
    return Pair(table(ours), table(theirs), known, complete, {})


@given(STATES, STATES, STATES)
def test_verdicts_of_a_known_base(ours, theirs, base):
    """With a base that is known, the verdict is what a comparison of three contents says, absence being one."""
    found = pair(ours, theirs, base)
    for name in found.names():
        one, other, was = ours[name], theirs[name], base[name]
        expected = (
            Verdict.SAME
            if one == other
            else Verdict.THEIRS
            if one == was
            else Verdict.OURS
            if other == was
            else Verdict.BOTH
        )
        assert found.judge(name).verdict is expected


@given(STATES, STATES, STATES)
def test_sides_are_mirrored(ours, theirs, base):
    """Seen from the other side each verdict is the mirrored one."""
    mirrored = {Verdict.OURS: Verdict.THEIRS, Verdict.THEIRS: Verdict.OURS}
    here, there = pair(ours, theirs, base), pair(theirs, ours, base)
    for name in here.names():
        verdict = here.judge(name).verdict
        assert there.judge(name).verdict is mirrored.get(verdict, verdict)


@given(STATES, STATES, STATES, st.sets(st.sampled_from(NAMES)))
def test_after_a_merge_the_next_finds_what_was_not_settled(ours, theirs, base, settled):
    """Taking theirs for the settled names leaves these without work, in both directions, and others as they were."""
    before = pair(ours, theirs, base)
    merged = {name: theirs[name] if name in settled else ours[name] for name in NAMES}
    next_base = before.next_base(settled)
    after = Pair(table(merged), table(theirs), next_base, True, {})
    for name in after.names():
        assert after.judge(name).verdict is (Verdict.SAME if name in settled else before.judge(name).verdict)


@given(STATES, STATES, STATES, st.sets(st.sampled_from(NAMES)))
def test_what_stays_by_decision_counts_as_ours_from_then_on(ours, theirs, base, settled):
    """A settled name that keeps our content is our change in the next merge, so that it is not asked about again."""
    before = pair(ours, theirs, base)
    after = Pair(table(ours), table(theirs), before.next_base(settled), True, {})
    for name in settled & set(after.names()):
        assert after.judge(name).verdict in (Verdict.SAME, Verdict.OURS)


def test_nothing_is_guessed():
    """Without a base, with one that does not know the name or not all, and with unread content it is untold."""
    ours, theirs = {"a": PRINTS[0]}, {"a": PRINTS[1]}
    assert Pair(table(ours), table(theirs), None, False, {}).judge("a").verdict is Verdict.UNTOLD
    assert Pair(table(ours), table(theirs), {"a": ""}, True, {}).judge("a").why == (
        "too large to tell which side changed it"
    )
    assert pair(ours, theirs, {}, complete=False).judge("a").verdict is Verdict.UNTOLD
    assert pair(ours, ours, {}, complete=False).judge("a").verdict is Verdict.SAME
    unread = VariablesTable({"a": Variable("list", 0, "", "", "it is nested too deeply")})
    for one, other in ((unread, table(theirs)), (table(ours), unread), (unread, unread)):
        told = Pair(one, other, {"a": PRINTS[0]}, True, {}).judge("a")
        assert told.verdict is Verdict.UNTOLD and "nested too deeply" in told.why


def test_an_unknown_base_stays_unknown_until_it_is_settled():
    """What could not be told stays so in the next base, and is known once it was settled."""
    found = Pair(table({"a": PRINTS[0]}), table({"a": PRINTS[1]}), None, False, {})
    assert found.next_base([]) == {"a": ""} and found.next_base(["a"]) == {"a": PRINTS[1]}


def test_another_object_without_content_is_a_change():
    """Locks have one fingerprint: that one was replaced is told by the side that did."""
    same = table({"a": PRINTS[0]})
    base = {"a": PRINTS[0]}
    for sides, verdict in (
        ([], Verdict.SAME),
        ([Verdict.OURS], Verdict.OURS),
        ([Verdict.THEIRS], Verdict.THEIRS),
        ([Verdict.OURS, Verdict.THEIRS], Verdict.BOTH),
    ):
        assert Pair(same, same, base, True, {"a": frozenset(sides)}).judge("a").verdict is verdict


@given(STATES, STATES)
def test_differences_cover_each_name_once(before, after):
    """Each name that differs is added, removed or changed, in sorted order; each that does not is none of them."""
    found = told_differences(table(before), table(after))
    for name in NAMES:
        places = [name in part for part in (found.added, found.removed, found.changed, found.unread)]
        assert places == [
            before[name] is None and after[name] is not None,
            before[name] is not None and after[name] is None,
            None not in (before[name], after[name]) and before[name] != after[name],
            False,
        ]
    assert list(found.changed) == sorted(found.changed)
