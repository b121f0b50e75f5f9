"""Attackers sit in real machines of the process engine, on the real kernel, as whoever runs the tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from machines import LIMITS, DrivenMachine
from podflare.engines.base import EngineOptions, Limits
from podflare.engines.process.engine import ProcessEngine


@pytest.fixture(scope="session")
def portal() -> Iterator[BlockingPortal]:
    """A thread with an event loop, for the engine."""
    with start_blocking_portal() as running:
        yield running


@pytest.fixture(scope="session")
def engine(portal: BlockingPortal, private_temp: Path) -> Iterator[ProcessEngine]:
    """A started process engine with a data directory of its own."""
    folder = tempfile.mkdtemp(prefix="e", dir=private_temp)
    Path(folder).chmod(0o711)

    async def make() -> ProcessEngine:
        made = ProcessEngine(EngineOptions(data_dir=folder, instance=Path(folder).name))
        await made.start()
        return made

    made = portal.call(make)
    yield made
    portal.call(made.aclose)
    shutil.rmtree(folder)


@pytest.fixture
def new_machine(portal: BlockingPortal, engine: ProcessEngine) -> Iterator[Callable[..., DrivenMachine]]:
    """Makes machines; all are closed at the end of the test."""
    made: list[DrivenMachine] = []

    def make(limits: Limits = LIMITS) -> DrivenMachine:
        made.append(DrivenMachine(portal, engine, limits))
        return made[-1]

    yield make
    for machine in made:
        machine.close()


@pytest.fixture
def attacker(new_machine: Callable[..., DrivenMachine]) -> DrivenMachine:
    """One machine in which hostile code runs."""
    return new_machine()
