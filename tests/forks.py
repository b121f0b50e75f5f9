"""Fixtures for machines with forks, all closed at the end of a test, forks and parents in whatever order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from machines import DrivenMachine


@pytest.fixture
def parent(new_machine: Callable[..., DrivenMachine]) -> DrivenMachine:
    """A machine to be forked."""
    return new_machine()


@pytest.fixture
def way() -> str:
    """How forks are made: "forked" from the parent, or "carried", as those of a machine that lies too deep."""
    return "forked"


@pytest.fixture
def fork(way: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[DrivenMachine]]]:
    """fork(machine, count=1, **options) -> its forks, closed at the end of the test."""
    made: list[DrivenMachine] = []
    if way == "carried":
        monkeypatch.setattr("podflare.engines.process.engine.MAX_DEPTH", 0)

    def do(machine: DrivenMachine, count: int = 1, **options: object) -> list[DrivenMachine]:
        children = machine.fork(count, **options)
        made.extend(children)
        return children

    yield do
    for machine in made:
        machine.close()
