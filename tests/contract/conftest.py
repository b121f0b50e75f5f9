"""Every engine, started: one suite of rules for all of them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from anyio.from_thread import BlockingPortal

import vms
from machines import DrivenMachine
from podflare.engines.base import Engine, EngineOptions
from podflare.engines.fake import FakeEngine
from podflare.engines.microvm.image.store import ImageStore
from podflare.engines.process.engine import ProcessEngine


async def make_fake(folder: Path, images: ImageStore | None) -> Engine:
    """The engine without walls."""
    return FakeEngine()


async def make_process(folder: Path, images: ImageStore | None) -> Engine:
    """The engine of namespaces and kernel fork."""
    return ProcessEngine(EngineOptions(data_dir=str(folder), instance=folder.name))


async def make_microvm(folder: Path, images: ImageStore | None) -> Engine:
    """The engine of virtual machines."""
    assert images is not None
    options = EngineOptions(data_dir=str(folder), instance=folder.name)
    started = await vms.started_engine(options, images)
    await started.aclose()  # it has booted now, which the time limits of these tests do not allow for
    return vms.engine_of(options, images)


Maker = Callable[[Path, ImageStore | None], Awaitable[Engine]]
ENGINES: dict[str, Maker] = {"fake": make_fake, "process": make_process, "microvm": make_microvm}
PARAMETERS = [pytest.param(name, marks=vms.MARKS if name == "microvm" else ()) for name in sorted(ENGINES)]


@pytest.fixture(scope="session", params=PARAMETERS)
def open_engines(
    request: pytest.FixtureRequest, portal: BlockingPortal, private_temp: Path
) -> Callable[[], AbstractContextManager[Engine]]:
    """A context with a new engine of one kind, not started; it is closed and its folder removed at the end."""

    images = None
    if request.param == "microvm":
        vms.skip_without(*vms.PROGRAMS)
        vms.skip_where_they_would_boot_anew()
        images = request.getfixturevalue("image_store")

    @contextmanager
    def open_engine() -> Iterator[Engine]:
        folder = Path(tempfile.mkdtemp(prefix="e", dir=private_temp))
        folder.chmod(0o711)
        engine = portal.call(ENGINES[request.param], folder, images)
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
        if started.name == "microvm":
            portal.call(vms.boot, started)  # from now on it holds the image
        yield started


@pytest.fixture(scope="session")
def part(request: pytest.FixtureRequest, engine: Engine) -> int:
    """By what the tests that need much computing are divided where instructions may be translated one by one."""
    return 20 if engine.name == "microvm" else 1


@pytest.fixture
def machine(new_machine: Callable[..., DrivenMachine]) -> DrivenMachine:
    """One machine whose guest waits for its first cell."""
    return new_machine()
