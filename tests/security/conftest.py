"""Attackers sit in real machines of the process engine, on the real kernel, as whoever runs the tests.

Every attack is counted: those that a test names one by one (`attempt`, `record`), and each other test as one, unless it
is marked as a control, which shows that what should work does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from attacking import HELD, Record, attempt_in

from machines import DrivenMachine
from networks import networked as networked

_KEY = "attack"


@pytest.fixture
def attacker(new_machine: Callable[..., DrivenMachine]) -> DrivenMachine:
    """One machine in which hostile code runs."""
    return new_machine()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Iterator[Record]:
    """record({name: what came of it}): counts these attacks; the test fails unless all held."""
    names: set[str] = set()

    def note(found: Mapping[str, str]) -> None:
        assert not names & found.keys(), "two attacks have one name"
        names.update(found)
        request.node.user_properties.extend((_KEY, result.startswith(HELD)) for result in found.values())
        assert not {name: result for name, result in found.items() if not result.startswith(HELD)}

    yield note
    assert names, "nothing was tried"


@pytest.fixture
def attempt(attacker: DrivenMachine, record: Record) -> Callable[..., None]:
    """attempt(attacks, prelude="", machine=attacker): tries each in the machine, which works on afterwards."""

    def run(attacks: Mapping[str, str], prelude: str = "", machine: DrivenMachine = attacker) -> None:
        record(attempt_in(machine, attacks, prelude))
        assert machine.run("print(6 * 7)").stdout == "42\n"

    return run


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "control: no attack, but what should work and does")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    # Added to what travels from the processes that run tests to the one that prints.
    counted = "record" in getattr(item, "fixturenames", ()) or item.get_closest_marker("control") is not None
    if call.when == "call" and not counted:
        item.user_properties.append((_KEY, call.excinfo is None))
    yield


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """N attacks tried, N held."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    results = [
        held for report in reports if report.when == "call" for key, held in report.user_properties if key == _KEY
    ]
    if results:
        who = "root" if os.geteuid() == 0 else f"an ordinary user (uid {os.geteuid()})"
        terminalreporter.write_line(f"attacks as {who}: {len(results)} tried, {sum(results)} held")
