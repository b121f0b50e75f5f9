"""What two machines were when they were last one: the base of a merge.  Pure.

A machine's history is the list of forks that its state came through.  A fork keeps its parent's files of that moment in
layers; the parent itself goes on.  What a layer is is the engine's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MAX_HISTORY = 256
"""Forks that are remembered of one machine; older ones are forgotten."""


@dataclass(frozen=True)
class Fork:
    """One fork, as its children remember it."""

    number: int
    """Later forks have higher ones."""
    parent: str
    """The machine that was forked."""
    layers: tuple[str, ...]
    """Names of what shows its files at that moment, topmost first."""


History = tuple[Fork, ...]
"""Latest first."""


def lengthened(history: History, fork: Fork) -> History:
    """The history of a machine that `fork` made of one with this history."""
    return (fork, *history[: MAX_HISTORY - 1])


def common_base(first: str, first_history: History, second: str, second_history: History) -> tuple[str, ...] | None:
    """The layers that show what both machines were at the last moment at which they were one, topmost first.

    Machines that never were one were the template: no layers.  None if that moment is forgotten.
    """
    known = {fork.number for fork in second_history}
    place = next((at for at, fork in enumerate(first_history) if fork.number in known), None)
    if place is None:
        if MAX_HISTORY in (len(first_history), len(second_history)):
            return None
        common, after = None, (first_history, second_history)
    else:
        common = first_history[place]
        others = [fork.number for fork in second_history].index(common.number)
        after = (first_history[:place], second_history[:others])
    # From there each went on in one machine, which later may have been forked into the present one.
    next_forks = [later[-1] if later else None for later in after]
    lines = [fork.parent if fork else own for fork, own in zip(next_forks, (first, second), strict=True)]
    if lines[0] == lines[1]:
        earliest = min((fork for fork in next_forks if fork), key=lambda fork: fork.number)
        return earliest.layers
    return common.layers if common else ()


def is_base(fork: Fork, living: Mapping[str, History]) -> bool:
    """Whether two of these machines, by name, have the moment of this fork as their base.

    Either two of its children went on into different ones of them, or one did and the parent went on into another.
    """
    lines = set()
    for name, history in living.items():
        place = next((at for at, known in enumerate(history) if known.number == fork.number), None)
        if place is not None:
            lines.add(history[place - 1].parent if place else name)
    if len(lines) != 1:
        return bool(lines)
    if fork.parent in living:
        return True
    return any(
        later.parent == fork.parent and later.number > fork.number for history in living.values() for later in history
    )
