"""What a benchmark emits: named measurements with their unit, and the goal that SPEC.md sets for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any


@dataclass(frozen=True)
class Series:
    """Measurements of one operation, in the order in which they were taken."""

    name: str
    unit: str
    values: tuple[float, ...]
    goal: str = ""
    """What SPEC.md wants, in words; empty for a peer that is only there to compare with."""
    peer: str = ""
    """Name of the series of the same run that this one is compared with."""
    note: str = ""

    @property
    def median(self) -> float:
        return percentile(self.values, 50)

    @property
    def p95(self) -> float:
        return percentile(self.values, 95)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "median": self.median, "p95": self.p95, "count": len(self.values)}


def percentile(values: Iterable[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks."""
    ranked = sorted(values)
    if not ranked:
        return math.nan
    position = (len(ranked) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (position - low)


def timed_ms(work: Callable[[], object]) -> float:
    """Milliseconds that `work` takes."""
    started = perf_counter()
    work()
    return (perf_counter() - started) * 1000


def interleaved(rounds: int, works: dict[str, Callable[[], object]], warm_ups: int = 3) -> dict[str, tuple[float, ...]]:
    """Milliseconds of each work, all of them once a round, so that a slow moment of the machine meets them alike."""
    for _ in range(warm_ups):
        for work in works.values():
            work()
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            taken[name].append(timed_ms(work))
    return {name: tuple(values) for name, values in taken.items()}


def ratios(series: list[Series]) -> Iterator[tuple[Series, float]]:
    """Each series that names a peer of the same run, with peer median / own median (above 1: faster than the peer)."""
    medians = {item.name: item.median for item in series}
    for item in series:
        if item.peer in medians and item.median:
            yield item, medians[item.peer] / item.median
