# Generated from _async/explore.py by scripts/unasync.py: change that file, not this one.
"""Search over forks: try candidates in branches, score them, keep the best.  Knows the sandbox, not the wire."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

from podflare.client import _ranking
from podflare.client._concurrency import each_sync, shield_sync
from podflare.client._ranking import Attempt, Exploration, Ranking
from podflare.errors import MachineFailed, PodflareError, SandboxNotFound
from podflare.wire.api import MAX_FORKS

if TYPE_CHECKING:
    from podflare.client._sync.sandbox import Sandbox
    from podflare.client._types import ExecResult

    Number: TypeAlias = float | None
    Score: TypeAlias = Callable[[Sandbox, ExecResult], Number]

DEFAULT_PARALLEL = 8

_BRANCH_FAILURES = (SandboxNotFound, MachineFailed)
"""Cost one branch.  Any other error would meet the next branch too, and ends the exploration."""


def explore(
    sandbox: Sandbox,
    candidates: Iterable[str],
    score: str | Score,
    keep: int = 1,
    parallel: int = DEFAULT_PARALLEL,
    *,
    timeout: float | None = None,
    reseed: bool = True,
) -> Exploration[Sandbox]:
    """Try each candidate in a fork of `sandbox`, and go on with the best.

    With keep=1 the best branch is merged into `sandbox`; if no candidate got a score, `sandbox` stays as it is.
    With keep=k the best k branches are returned instead, for the caller to close, and `sandbox` stays as it is:
    one level of a beam search. All other branches are closed as soon as they are out of the race, on every path
    out of here. No candidate sees what another one did. A candidate whose cell fails, or whose branch dies, has
    no score and cannot win; the others go on.

    Args:
        candidates: Python code, any number; more than 32 are forked in batches.
        score: the higher the better. Code whose last line is an expression, evaluated in the branch after the
            candidate; or a callable that gets the branch and the candidate's `ExecResult` and returns a number,
            or None for no score. As `parallel` allows it is called for several branches at a time, each in a thread
            of its own.
        keep: how many branches are kept.
        parallel: how many branches run at a time.
        timeout: seconds for each cell, the candidate's and the score's.
        reseed: as in `fork`; False lets every candidate draw the same random numbers.
    Raises: ValueError or TypeError for arguments that cannot work, before anything is forked; what `score`
        raises; the errors of `fork` and `merge_into`. `sandbox` is unchanged then, unless the merge itself was
        cut off.
    If interrupted (Ctrl-C): running branches are ended, and `sandbox` is unchanged. A fork under way is
        waited for, so that its branches are closed too.
    """
    listed = _ranking.checked_candidates(candidates)
    _ranking.check_count("keep", keep)
    _ranking.check_count("parallel", parallel)
    cell = _ranking.score_cell(score) if isinstance(score, str) else None
    rule = None if isinstance(score, str) else score
    search = _Search(sandbox, Ranking(keep), cell, rule, timeout, reseed)
    try:
        for start in range(0, len(listed), MAX_FORKS):
            search.batch(start, listed[start : start + MAX_FORKS], parallel)
        return search.settle(merge=keep == 1)
    finally:
        with shield_sync():
            search.close()


class _Search:
    """One exploration under way.  Owns every branch until it is closed, merged or handed out."""

    def __init__(
        self,
        sandbox: Sandbox,
        ranking: Ranking[Sandbox],
        cell: str | None,
        rule: Score | None,
        timeout_s: float | None,
        reseed: bool,
    ) -> None:
        self._sandbox = sandbox
        self._ranking = ranking
        self._cell, self._rule = cell, rule
        self._timeout_s = timeout_s
        self._reseed = reseed
        self._attempts: dict[int, Attempt] = {}
        self._open: dict[str, Sandbox] = {}
        self._lock = threading.Lock()  # branches come in from several threads

    def batch(self, start: int, candidates: list[str], parallel: int) -> None:
        """Fork once for all `candidates`, the first of which has the index `start`, and run them."""
        branches: list[Sandbox] = []

        def fork(count: int) -> None:
            # Shielded, or in a thread of its own: whatever ends this search must not lose the answer.
            with shield_sync():
                branches.extend(self._sandbox.fork(count, reseed=self._reseed))
                self._open.update((branch.id, branch) for branch in branches)

        def attempt(place: int) -> None:
            self._attempt(branches[place], start + place, candidates[place])

        each_sync(fork, [len(candidates)], 1, self.close)
        each_sync(attempt, range(len(candidates)), parallel, self.close)

    def _attempt(self, branch: Sandbox, index: int, candidate: str) -> None:
        try:
            attempt = self._score(branch, index, candidate)
        except _BRANCH_FAILURES as error:
            attempt = _ranking.lost(index, candidate, error)
        with self._lock:
            self._attempts[index] = attempt
            loser = self._ranking.add(attempt, branch)
        if loser is not None and self._open.pop(loser.id, None) is not None:
            loser.close()

    def _score(self, branch: Sandbox, index: int, candidate: str) -> Attempt:
        result = branch.run_code(candidate, timeout=self._timeout_s)
        attempt = Attempt(index, candidate, result)
        if not result.ok:
            return _ranking.failed(attempt)
        if self._cell is not None:
            return _ranking.scored_by_cell(attempt, branch.run_code(self._cell, timeout=self._timeout_s))
        assert self._rule is not None
        value = self._rule(branch, result)
        return _ranking.scored(attempt, value)

    def settle(self, *, merge: bool) -> Exploration[Sandbox]:
        """Merge the winner, or hand the kept branches out."""
        attempts = tuple(self._attempts[index] for index in sorted(self._attempts))
        ranking, branches = self._ranking.attempts(), self._ranking.branches()
        if not merge:
            self._open.clear()
            return Exploration(attempts, ranking, branches)
        for winner in branches:
            self._sandbox.merge_into(winner)
        return Exploration(attempts, ranking)

    def close(self) -> None:
        """Close every branch that is still here.  What that raises is less than what brought us here."""
        while self._open:
            with contextlib.suppress(PodflareError, KeyError):  # KeyError: another thread took the last one
                self._open.popitem()[1].close()
