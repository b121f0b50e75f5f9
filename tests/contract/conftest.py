"""Every engine, started: one suite of rules for all of them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from anyio.from_thread import BlockingPortal

from machines import DrivenMachine
from podflare.engines.base import Engine, EngineOptions
from podflare.engines.fake import FakeEngine
from podflare.engines.process.engine import ProcessEngine


async def make_fake(folder: Path) -> Engine:
    """The engine without walls."""
    return FakeEngine()


async def make_process(folder: Path) -> Engine:
    """The engine of namespaces and kernel fork."""
    return ProcessEngine(EngineOptions(data_dir=str(folder), instance=folder.name))


ENGINES: dict[str, Callable[[Path], Awaitable[Engine]]] = {"fake": make_fake, "process": make_process}


@pytest.fixture(scope="session", params=sorted(ENGINES))
def open_engines(
    request: pytest.FixtureRequest, portal: BlockingPortal, private_temp: Path
) -> Callable[[], AbstractContextManager[Engine]]:
    """A context with a new engine of one kind, not started; it is closed and its folder removed at the end."""

    @contextmanager
    def open_engine() -> Iterator[Engine]:
        folder = Path(tempfile.mkdtemp(prefix="e", dir=private_temp))
        folder.chmod(0o711)
        engine = portal.call(ENGINES[request.param], folder)
        try:
            yield engine
        finally:
            portal.call(engine.aclose)
            shutil.rmtree(folder)

    return open_engine


@pytest.fixture
def new_engine(open_engines: Callable[[], AbstractContextManager[Engine]]) -> Iterator[Engine]:
    """An engine that was not started, for this test alone."""
    with open_engines() as engine:
        yield engine


@pytest.fixture(scope="session")
def engine(open_engines: Callable[[], AbstractContextManager[Engine]], portal: BlockingPortal) -> Iterator[Engine]:
    """A started engine, shared by the tests."""
    with open_engines() as started:
        portal.call(started.start)
        yield started


@pytest.fixture
def machine(new_machine: Callable[..., DrivenMachine]) -> DrivenMachine:
    """One machine whose guest waits for its first cell."""
    return new_machine()
