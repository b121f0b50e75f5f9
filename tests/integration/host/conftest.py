"""Daemons over the fake engine, and over guests that follow a script."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from hosting import Host, running
from scripted_guest import Script, ScriptedEngine

from podflare.engines.fake import FakeEngine

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
