"""Attackers sit in real machines of the process engine, on the real kernel, as whoever runs the tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from machines import DrivenMachine
from networks import networked as networked


@pytest.fixture
def attacker(new_machine: Callable[..., DrivenMachine]) -> DrivenMachine:
    """One machine in which hostile code runs."""
    return new_machine()
