"""Which side changed a variable: two sandboxes' tables, held against what both know of the moment they have in common.

A base is in the memory of the REPLs themselves, so it goes where their memory goes: forks inherit it, `merge_into`
brings it along, a new Python process has none.  Each fork makes one, each merge of variables another: after it the
base is what the other side had then, as a commit is for later merges of the same branch.  So a second merge finds
nothing to do, and one after further work finds only that.
"""

from __future__ import annotations

import enum
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

import anyio

from podflare.host.variables import Holder, Staged, recall, remember, table_of
from podflare.wire.api import VariableChange, VariablesDiff, VariableState
from podflare.wire.variables import MAX_VARIABLES, Variable, VariablesBase, VariablesRemember, VariablesTable

_LEAST_S = 0.05


class Verdict(enum.Enum):
    """Who changed a variable since the common base.  Removed and added count as changed."""

    SAME = "same"
    """Both have the same now: nothing is to be done, whoever changed it."""
    OURS = "ours"
    THEIRS = "theirs"
    BOTH = "both"
    """Both changed it, to different values."""
    UNTOLD = "untold"
    """The two differ now, or could not be compared, and what it was at the base is not known: see `why`."""


@dataclass(frozen=True)
class Judgement:
    """Of one variable."""

    verdict: Verdict
    why: str = ""
    """Of UNTOLD, in words for the user."""


@dataclass(frozen=True)
class Pair:
    """Two sandboxes' variables as they are now, and what each was at their latest common base."""

    ours: VariablesTable
    theirs: VariablesTable
    base: Mapping[str, str] | None
    """Name -> fingerprint at the base, empty where it is not known; None if no common base is remembered."""
    base_complete: bool
    """Whether a name that is not in `base` was certainly not there."""
    replaced: Mapping[str, frozenset[Verdict]]
    """Variables without readable content, and on which side (OURS, THEIRS) they are another object since the base."""
    token: str = ""
    """Of the base."""

    def names(self) -> list[str]:
        """Of all variables that one of them has, sorted."""
        return sorted(set(self.ours.variables) | set(self.theirs.variables))

    def judge(self, name: str) -> Judgement:
        """Who changed `name`."""
        ours, theirs = self.ours.variables.get(name), self.theirs.variables.get(name)
        replaced = self.replaced.get(name, frozenset())
        for side, told in (("this", ours), ("the other", theirs)):
            if told is not None and not told.fingerprint:
                return Judgement(Verdict.UNTOLD, f"its content in {side} sandbox is not known: {told.unread}")
        if _content(ours) == _content(theirs) and not replaced:
            return Judgement(Verdict.SAME)
        if self.base is None:
            return Judgement(Verdict.UNTOLD, "the two sandboxes remember no moment that they have in common")
        was = self.base.get(name)
        if was == "" or (was is None and not self.base_complete):
            return Judgement(Verdict.UNTOLD, "too large to tell which side changed it")
        changed = {
            side
            for side, told in ((Verdict.OURS, ours), (Verdict.THEIRS, theirs))
            if _content(told) != was or side in replaced
        }
        return Judgement(changed.pop() if len(changed) == 1 else Verdict.BOTH)

    def next_base(self, settled: Iterable[str]) -> dict[str, str]:
        """The base after a merge of the other's variables into ours that settled these names.

        Those that are not settled keep the base that they had, so that the next merge finds them again.
        """
        base = dict(self.base or {})
        for name in self.names() if self.base is None else ():
            base[name] = ""
        for name in settled:
            theirs = self.theirs.variables.get(name)
            if theirs is None:
                base.pop(name, None)
            else:
                base[name] = theirs.fingerprint
        return dict(sorted(base.items())[:MAX_VARIABLES])


def _content(variable: Variable | None) -> str | None:
    return None if variable is None else variable.fingerprint


async def compare(ours: Holder, theirs: Holder, *, timeout_s: float) -> Pair:
    """Both tables, read at the same time, and the base.  Precondition: a turn is held in both.

    Raises: as variables.table_of.
    """
    deadline_s = time.monotonic() + timeout_s
    holders = {Verdict.OURS: ours, Verdict.THEIRS: theirs}
    tables = await _tables(holders, timeout_s)
    common = set(tables[Verdict.THEIRS].bases)
    token = next((one for one in reversed(tables[Verdict.OURS].bases) if one in common), None)
    if token is None:
        return Pair(tables[Verdict.OURS], tables[Verdict.THEIRS], None, False, {})
    bases: dict[Verdict, VariablesBase] = {}

    async def remembered(side: Verdict) -> None:
        table = tables[side]
        if token in table.present:
            told = {name: one.fingerprint for name, one in table.variables.items()}
            bases[side] = VariablesBase(told, (), table.left_out == 0)
        else:
            bases[side] = await recall(holders[side], token, timeout_s=max(_LEAST_S, deadline_s - time.monotonic()))

    await _at_once(remembered)
    return _joined(tables, bases, token)


async def differences(ours: Holder, theirs: Holder, *, timeout_s: float) -> VariablesDiff:
    """Which variables differ now, whoever changed them.  Precondition: a turn is held in both.

    Raises: as variables.table_of.
    """
    tables = await _tables({Verdict.OURS: ours, Verdict.THEIRS: theirs}, timeout_s)
    return told_differences(tables[Verdict.OURS], tables[Verdict.THEIRS])


def told_differences(before: VariablesTable, after: VariablesTable) -> VariablesDiff:
    """What two tables differ in."""
    added, removed, changed, unread = {}, {}, {}, {}
    for name in sorted(set(before.variables) | set(after.variables)):
        old, new = before.variables.get(name), after.variables.get(name)
        if old is None or new is None:
            if new is not None:
                added[name] = _state(new)
            elif old is not None:
                removed[name] = _state(old)
        elif old.unread or new.unread:
            unread[name] = old.unread or new.unread
        elif old.fingerprint != new.fingerprint:
            changed[name] = VariableChange(old.type, new.type, old.size, new.size, old.fingerprint, new.fingerprint)
    return VariablesDiff(added, removed, changed, unread)


def _state(variable: Variable) -> VariableState:
    return VariableState(variable.type, variable.size, variable.fingerprint)


async def _tables(holders: Mapping[Verdict, Holder], timeout_s: float) -> dict[Verdict, VariablesTable]:
    tables: dict[Verdict, VariablesTable] = {}

    async def survey(side: Verdict) -> None:
        tables[side] = await table_of(holders[side], timeout_s=timeout_s)

    if holders[Verdict.OURS] is holders[Verdict.THEIRS]:
        await survey(Verdict.OURS)
        return dict.fromkeys(holders, tables[Verdict.OURS])
    await _at_once(survey)
    return tables


async def _at_once(work: Callable[[Verdict], Awaitable[None]]) -> None:
    failure: Exception | None = None

    async def one(side: Verdict) -> None:
        nonlocal failure
        try:
            await work(side)
        except Exception as exc:  # noqa: BLE001  # raised below, one of them and not in a group
            failure = failure or exc

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one, Verdict.OURS)
        tasks.start_soon(one, Verdict.THEIRS)
    if failure is not None:
        raise failure


def _joined(tables: Mapping[Verdict, VariablesTable], bases: Mapping[Verdict, VariablesBase], token: str) -> Pair:
    """The two sides' knowledge of one base, put together: what one of them had no time to read the other may know."""
    first, second = bases[Verdict.OURS], bases[Verdict.THEIRS]
    base = dict(first.fingerprints)
    for name, fingerprint in second.fingerprints.items():
        base[name] = base.get(name) or fingerprint
    replaced = {
        name: frozenset(side for side, told in bases.items() if name in told.replaced)
        for name in {*first.replaced, *second.replaced}
    }
    return Pair(tables[Verdict.OURS], tables[Verdict.THEIRS], base, first.complete or second.complete, replaced, token)


async def settle(
    staged: Staged, theirs: Holder, pair: Pair, *, drop: tuple[str, ...], settled: Iterable[str], timeout_s: float
) -> None:
    """Bind what is staged in ours, unbind `drop`, and move the pair's base on to what theirs has now.

    Args:
        settled: the names that need no merge any more: taken, dropped, or decided to stay as they are in ours.
            Not those that were refused or left out, or the next merge would not find them.
    Raises: as variables.table_of.  If it fails before ours is told to commit, nothing has changed there.
    """
    names = set(settled)
    base = VariablesRemember(
        secrets.token_hex(8),
        pair.next_base(names),
        since=pair.token,
        unsettled=tuple(sorted(name for name in pair.replaced if name not in names)),
    )
    await remember(theirs, base, timeout_s=timeout_s)
    await staged.commit(drop=drop, base=base)
