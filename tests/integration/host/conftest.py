"""Daemons over the fake engine, over guests that follow a script, and over an engine with walls."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from hosting import Host, running
from podflare.engines.base import Engine
from podflare.engines.fake import FakeEngine
from scripted_guest import Script, ScriptedEngine

HostFactory = Callable[..., AbstractAsyncContextManager[Host]]


@pytest.fixture
def host(data_dir: Path) -> HostFactory:
    """`async with host(**settings)`: a daemon over the fake engine."""
    return lambda **settings: running(data_dir, FakeEngine(), **settings)


@pytest.fixture
def scripted(data_dir: Path) -> HostFactory:
    """`async with scripted(script, **settings)`: a daemon whose guests follow the script."""

    @asynccontextmanager
    async def start(script: Script, **settings: Any) -> AsyncIterator[Host]:
        async with anyio.create_task_group() as tasks:
            async with running(data_dir, ScriptedEngine(tasks, script), **settings) as found:
                yield found

    return start


@pytest.fixture
def walled(data_dir: Path, make_engine: Callable[[Path], Engine]) -> HostFactory:
    """`async with walled(**settings)`: a daemon over an engine with walls."""

    @asynccontextmanager
    async def start(**settings: Any) -> AsyncIterator[Host]:
        folder = data_dir / "engine"
        folder.mkdir(mode=0o711)
        async with running(data_dir, make_engine(folder), **settings) as found:
            yield found
        assert os.listdir(folder / "machines") == []

    return start
