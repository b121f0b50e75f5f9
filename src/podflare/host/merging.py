"""Three-way merge of one sandbox's changes into another, files and variables as one step.  Knows no HTTP.

Both are planned before anything changes.  Then values are put ready in the receiving REPL, files are changed so that
it can be undone, variables are bound at one moment, and the files' old state is given up: what fails before the
binding leaves all as it was.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace

import anyio

from podflare.engines.base import FileMerge, FilesPlan
from podflare.errors import Conflict
from podflare.host.sandbox import Sandbox
from podflare.host.variables import Staged, Unimportable, staged
from podflare.host.verdicts import Pair, Verdict, compare, settle
from podflare.wire.merges import (
    ERROR,
    FILE,
    OURS,
    THEIRS,
    VARIABLE,
    ConflictInfo,
    MergeReport,
    MergeRequest,
    MergeSide,
    NotTransferable,
)
from podflare.wire.variables import Variable

LEAST_S = 0.05
MAX_UNIMPORTABLE = 32
"""Values that may turn out not to be importable, one after the other, before the merge is given up."""

_ONLY_ITS_OWNERS = "it belongs to the process that made it"


class Deadline:
    """When a merge has to be done."""

    def __init__(self, seconds: float) -> None:
        self._ends_s = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        return max(LEAST_S, self._ends_s - time.monotonic())


@dataclass
class VariablesPlan:
    """What a merge would do to variables."""

    pair: Pair
    take: list[str] = field(default_factory=list)
    drop: list[str] = field(default_factory=list)
    conflicts: list[ConflictInfo] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    """Name -> why it cannot travel."""
    settled: list[str] = field(default_factory=list)
    """Names that need nothing."""

    def refuse(self, names: Mapping[str, str]) -> None:
        """These turned out not to be transferable."""
        self.refused.update(names)
        self.take = [name for name in self.take if name not in names]

    def outcome(self) -> list[str]:
        """The names whose merge is settled once all is done as planned."""
        decided = [item.name for item in self.conflicts if item.name not in self.refused]
        return [*self.settled, *self.take, *self.drop, *decided]


async def merge_changes(ours: Sandbox, theirs: Sandbox, request: MergeRequest, deadline: Deadline) -> MergeReport:
    """Bring what `theirs` changed since both were one into `ours`.  Precondition: a turn is held in both.

    With conflicts that nothing resolves it changes nothing, and says so (`applied`).
    Raises: as Machine.merge_files and FileMerge.apply, verdicts.compare and settle; Conflict if a variable that was
        asked for by name cannot travel.  Then nothing has changed, or the message says what may have.
    If cancelled: it is done, or nothing has changed.
    """
    async with AsyncExitStack() as stack:
        files: FileMerge | None = None
        plan = FilesPlan((), (), ())
        if request.paths:
            files = await ours.machine.merge_files(theirs.machine, request.paths, timeout_s=deadline.left_s)
            stack.push_async_callback(files.aclose)
            plan = files.plan
        variables: VariablesPlan | None = None
        if request.variables:
            pair = await compare(ours, theirs, timeout_s=deadline.left_s)
            variables = plan_variables(pair, request.names)
        conflicts = _resolved([*_file_conflicts(plan), *(variables.conflicts if variables else ())], request)
        if any(item.resolution is None for item in conflicts):
            return _report(plan, variables, conflicts, applied=False)
        if variables is not None:
            _decide(variables, [item for item in conflicts if item.kind == VARIABLE])
            _check_named(variables, request.names)
        decisions = {item.name: str(item.resolution) for item in conflicts if item.kind == FILE}
        await _apply(ours, theirs, files, decisions, variables, request, deadline)
        return _report(plan, variables, conflicts, applied=True)


def plan_variables(pair: Pair, names: Sequence[str] | None) -> VariablesPlan:
    """Who has to give up what.  Args: names: only these; None for all."""
    plan = VariablesPlan(pair)
    wanted = None if names is None else frozenset(names)
    for name in pair.names():
        if wanted is not None and name not in wanted:
            continue
        judged = pair.judge(name)
        theirs = pair.theirs.variables.get(name)
        if judged.verdict in (Verdict.SAME, Verdict.OURS):
            plan.settled.append(name)
        elif judged.verdict is Verdict.THEIRS:
            if theirs is None:
                plan.drop.append(name)
            elif theirs.obstacle:
                plan.refused[name] = theirs.obstacle
            else:
                plan.take.append(name)
        elif judged.verdict is Verdict.UNTOLD and theirs is not None and theirs.obstacle:
            plan.refused[name] = theirs.obstacle
        else:
            plan.conflicts.append(_variable_conflict(pair, name, judged.why))
    return plan


def _variable_conflict(pair: Pair, name: str, why: str) -> ConflictInfo:
    told = (pair.ours.variables.get(name), pair.theirs.variables.get(name))
    if not why:
        gone = [place for place, variable in zip(("here", "there"), told, strict=True) if variable is None]
        why = f"changed in both, deleted {gone[0]}" if gone else "changed in both"
    version = "|".join("" if one is None else one.fingerprint or f"{one.type} {one.size}" for one in told)
    ours, theirs = (_side(one) for one in told)
    return ConflictInfo(VARIABLE, name, why, ours, theirs, version)


def _side(variable: Variable | None) -> MergeSide | None:
    return None if variable is None else MergeSide(variable.type, variable.size)


def _file_conflicts(plan: FilesPlan) -> list[ConflictInfo]:
    return [ConflictInfo(FILE, one.path, one.why, one.ours, one.theirs, one.version) for one in plan.conflicts]


def _resolved(conflicts: Iterable[ConflictInfo], request: MergeRequest) -> list[ConflictInfo]:
    """With the resolutions that were given for exactly these, else with the request's general one."""
    given = {(one.kind, one.name): one for one in request.resolutions}
    general = None if request.on_conflict == ERROR else request.on_conflict
    found = []
    for item in conflicts:
        one = given.get((item.kind, item.name))
        counts = one is not None and one.version in ("", item.version)
        found.append(replace(item, resolution=one.resolution if one is not None and counts else general))
    return found


def _decide(variables: VariablesPlan, conflicts: list[ConflictInfo]) -> None:
    variables.conflicts = conflicts
    for item in conflicts:
        if item.resolution == THEIRS:
            told = variables.pair.theirs.variables.get(item.name)
            if told is None:
                variables.drop.append(item.name)
            elif told.obstacle:
                variables.refused[item.name] = told.obstacle
            else:
                variables.take.append(item.name)


def _check_named(variables: VariablesPlan, names: Sequence[str] | None) -> None:
    """Raises: Conflict if one that was asked for by name cannot travel."""
    for name in names or ():
        if name in variables.refused:
            raise Conflict(f"variable {name!r} cannot be merged: {variables.refused[name]}; nothing has changed")


async def _apply(
    ours: Sandbox,
    theirs: Sandbox,
    files: FileMerge | None,
    decisions: Mapping[str, str],
    variables: VariablesPlan | None,
    request: MergeRequest,
    deadline: Deadline,
) -> None:
    if variables is None or not _moves(variables):
        await _change_files(files, decisions, deadline)
        if files is not None:
            await files.keep()
        return
    for _ in range(MAX_UNIMPORTABLE):
        names = tuple(sorted(variables.take))
        try:
            async with staged(theirs, ours, names, timeout_s=deadline.left_s) as parcel:
                variables.refuse(parcel.refused)
                _check_named(variables, request.names)
                await _change_files(files, decisions, deadline)
                # From here on it is done whatever becomes of the caller: half of it would be neither state.
                with anyio.CancelScope(shield=True):
                    await _bind(theirs, parcel, variables, deadline)
                    if files is not None:
                        await files.keep()
                return
        except Unimportable as exc:
            if exc.name not in names:
                raise
            variables.refuse({exc.name: str(exc)})
            _check_named(variables, request.names)
    raise Conflict(f"more than {MAX_UNIMPORTABLE} variables cannot be set in {ours.id}; nothing has changed")


async def _bind(theirs: Sandbox, parcel: Staged, variables: VariablesPlan, deadline: Deadline) -> None:
    await settle(
        parcel,
        theirs,
        variables.pair,
        drop=tuple(sorted(variables.drop)),
        settled=variables.outcome(),
        timeout_s=deadline.left_s,
    )


async def _change_files(files: FileMerge | None, decisions: Mapping[str, str], deadline: Deadline) -> None:
    if files is not None:
        await files.apply(decisions, timeout_s=deadline.left_s)


def _moves(variables: VariablesPlan) -> bool:
    """Whether values or at least the base have to be moved."""
    base = variables.pair.next_base(variables.outcome())
    return bool(variables.take or variables.drop) or base != dict(variables.pair.base or {})


def _report(
    plan: FilesPlan, variables: VariablesPlan | None, conflicts: Iterable[ConflictInfo], *, applied: bool
) -> MergeReport:
    conflicts = sorted(conflicts, key=lambda item: (item.kind, item.name))
    decided = {item.name: item.resolution for item in conflicts if item.kind == FILE}
    files = set(plan.merged)
    for one in plan.conflicts:
        files.update(one.paths if decided[one.path] == THEIRS else one.paths_if_ours if decided[one.path] else ())
    lost = [NotTransferable(FILE, path, kind, _ONLY_ITS_OWNERS) for path, kind in plan.skipped]
    names: list[str] = []
    if variables is not None:
        names = [*variables.take, *variables.drop]
        told = variables.pair.theirs.variables
        lost += [
            NotTransferable(VARIABLE, name, told[name].type, why) for name, why in sorted(variables.refused.items())
        ]
        if variables.pair.theirs.left_out:
            count = variables.pair.theirs.left_out
            lost.append(NotTransferable(VARIABLE, "", "", f"{count} more variables are too many or have odd names"))
        conflicts = [
            replace(item, resolution=OURS) if item.kind == VARIABLE and item.name in variables.refused else item
            for item in conflicts
        ]
    return MergeReport(applied, tuple(sorted(files)), tuple(sorted(names)), tuple(conflicts), tuple(lost))
