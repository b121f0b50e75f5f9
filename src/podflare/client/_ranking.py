"""The pure half of `explore`: what a score is, who leads, what the caller gets.  No I/O."""

from __future__ import annotations

import ast
import math
import textwrap
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from podflare.client._types import ExecResult
from podflare.errors import BadRequest

S = TypeVar("S")


@dataclass(frozen=True)
class Attempt:
    """What became of one candidate."""

    index: int
    """Its place among the candidates."""
    candidate: str
    result: ExecResult | None = None
    """Of its cell; None if its branch died under it."""
    score: float | None = None
    """None if there is none: then it cannot win."""
    problem: str = ""
    """Why there is no score."""


@dataclass(frozen=True)
class Exploration(Generic[S]):
    """What `explore` found."""

    attempts: tuple[Attempt, ...]
    """One for each candidate, in their order."""
    ranking: tuple[Attempt, ...]
    """The kept ones, best first; equal scores in the candidates' order."""
    branches: tuple[S, ...] = ()
    """With keep > 1: the sandboxes of `ranking`, which now are the caller's to close.  Empty after a merge."""

    @property
    def best(self) -> Attempt | None:
        """The winner; None if no candidate got a score."""
        return self.ranking[0] if self.ranking else None


@dataclass(order=True)
class _Place(Generic[S]):
    key: tuple[float, int]
    attempt: Attempt = field(compare=False)
    branch: S = field(compare=False)


class Ranking(Generic[S]):
    """The best `keep` branches so far, whatever the order in which they come in."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._places: list[_Place[S]] = []

    def add(self, attempt: Attempt, branch: S) -> S | None:
        """Enter a branch; the one that is out of the race now, which may be itself."""
        if attempt.score is None:
            return branch
        insort(self._places, _Place((-attempt.score, attempt.index), attempt, branch))
        return self._places.pop().branch if len(self._places) > self._keep else None

    def attempts(self) -> tuple[Attempt, ...]:
        """The kept ones, best first."""
        return tuple(place.attempt for place in self._places)

    def branches(self) -> tuple[S, ...]:
        """The sandboxes of `attempts`."""
        return tuple(place.branch for place in self._places)


def checked_candidates(candidates: Iterable[str]) -> list[str]:
    """Raises: TypeError unless it is a collection of str; one str is none."""
    listed = [] if isinstance(candidates, str) else list(candidates)
    if isinstance(candidates, str) or not all(isinstance(candidate, str) for candidate in listed):
        raise TypeError("explore: candidates must be several strings of code, as in [code, code]")
    return listed


def check_count(name: str, value: object) -> None:
    """Raises: ValueError (BadRequest) unless it is an integer above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadRequest(f"explore: {name} must be an integer of at least 1, got {value!r:.80}")


def score_cell(code: str) -> str:
    """`code`, whose last line is an expression, as a cell whose value is that expression as a plain float.

    Raises: ValueError (BadRequest) if it is no Python or does not end with an expression.
    """
    try:
        tree = _parsed(code)
    except (SyntaxError, ValueError) as exc:
        raise BadRequest(f"explore: the score is no Python code: {exc}") from exc
    if not tree.body or not isinstance(tree.body[-1], ast.Expr):
        raise BadRequest("explore: the score's last line must be an expression, the number to maximise")
    # A number type of a library would show itself as more than a number, and `float` may be a name of the user's.
    plain = ast.parse("__import__('builtins').float()", mode="eval").body
    assert isinstance(plain, ast.Call)
    plain.args = [tree.body[-1].value]
    tree.body[-1].value = plain
    return ast.unparse(ast.fix_missing_locations(tree))


def _parsed(code: str) -> Any:
    flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    try:
        return compile(code, "<score>", "exec", flags)
    except IndentationError:
        return compile(textwrap.dedent(code), "<score>", "exec", flags)


def scored(attempt: Attempt, value: object) -> Attempt:
    """`attempt` with the number that its scoring gave.  Not a number means no score.

    Raises: TypeError if `value` is neither None nor a number.
    """
    if value is None:
        return _without(attempt, "the score is None")
    if not hasattr(value, "__float__") and not hasattr(value, "__index__"):
        raise TypeError(f"explore: the score must be a number or None, got {value!r:.80}")
    number = float(value)  # type: ignore[arg-type]  # what the look above is for
    if math.isnan(number):
        return _without(attempt, "the score is not a number")
    return Attempt(attempt.index, attempt.candidate, attempt.result, number)


def scored_by_cell(attempt: Attempt, done: ExecResult) -> Attempt:
    """`attempt` with the value of its score cell."""
    if not done.ok:
        return _without(attempt, f"the score failed: {failure(done)}")
    try:
        return scored(attempt, float(done.results[-1].text))
    except (IndexError, ValueError):
        return _without(attempt, "the score gave no value")


def failed(attempt: Attempt) -> Attempt:
    """`attempt`, whose cell did not end well."""
    return _without(attempt, f"the candidate failed: {failure(attempt.result)}" if attempt.result else "no result")


def lost(index: int, candidate: str, error: Exception) -> Attempt:
    """The attempt whose branch died."""
    return Attempt(index, candidate, problem=str(error))


def failure(done: ExecResult) -> str:
    """Why a cell did not end well, in one line."""
    if done.error is not None:
        return f"{done.error.name}: {done.error.value}"
    return f"exit code {done.exit_code} ({done.reason})"


def _without(attempt: Attempt, problem: str) -> Attempt:
    return Attempt(attempt.index, attempt.candidate, attempt.result, None, problem)
