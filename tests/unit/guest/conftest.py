"""Guests for tests: the real bundle in a child process, a temporary directory as home."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from guest_driver import Guest

from podflare.engines.bundle import build_bundle


@pytest.fixture(scope="session")
def bundle(private_temp: Path) -> Iterator[Path]:
    """The bundle, built once."""
    folder = Path(tempfile.mkdtemp(prefix="b", dir=private_temp))
    yield build_bundle(folder)
    shutil.rmtree(folder)


@pytest.fixture
def home(private_temp: Path) -> Iterator[Path]:
    """An empty home directory."""
    folder = Path(tempfile.mkdtemp(prefix="h", dir=private_temp))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def start_guest(bundle: Path, home: Path) -> Iterator[Callable[..., Guest]]:
    """Starts guests; all of them are closed, and must end, after the test."""
    started: list[Guest] = []

    def start(**options: Any) -> Guest:
        started.append(Guest(bundle, home, **options))
        return started[-1]

    yield start
    for guest in started:
        guest.close()


@pytest.fixture
def guest(start_guest: Callable[..., Guest]) -> Guest:
    """A guest that waits for its first cell."""
    ready = start_guest()
    ready.wait_ready()
    return ready
