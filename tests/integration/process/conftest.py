"""Machines with forks, all closed at the end of a test, forks and parents in whatever order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from machines import DrivenMachine


@pytest.fixture
def parent(new_machine: Callable[..., DrivenMachine]) -> DrivenMachine:
    """A machine to be forked."""
    return new_machine()


@pytest.fixture
def fork() -> Iterator[Callable[..., list[DrivenMachine]]]:
    """fork(machine, count=1, **options) -> its forks, closed at the end of the test."""
    made: list[DrivenMachine] = []

    def do(machine: DrivenMachine, count: int = 1, **options: object) -> list[DrivenMachine]:
        children = machine.fork(count, **options)
        made.extend(children)
        return children

    yield do
    for machine in made:
        machine.close()
