"""Promise: virtual machines get over what happens to their computer, or end and say why."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest
from anyio.from_thread import BlockingPortal

import vms
from machines import DrivenMachine
from podflare.engines.base import Engine
from podflare.engines.microvm import clocks
from podflare.errors import MachineFailed

pytestmark = list(vms.MARKS)
STILL_S = 1.5
NEAR_S = 1.0
FILL = """
import os
with open("/root/big", "wb") as file:
    for _ in range(90): file.write(os.urandom(1 << 20))
os.sync()
"""
TELL_TIME = "import time; print(time.time())"


@pytest.fixture
def other_engine(
    portal: BlockingPortal, data_dir: Path, make_engine: Callable[[Path], Engine]
) -> Iterator[Callable[[Path], Engine]]:
    """other_engine(folder): one with its data there, closed at the end of the test."""
    made: list[Engine] = []

    def make(folder: Path) -> Engine:
        made.append(make_engine(folder))
        portal.call(made[-1].start)
        return made[-1]

    yield make
    for engine in made:
        portal.call(engine.aclose)


def lag_s(machine: DrivenMachine) -> float:
    """By how much the machine's clock is slow at least; negative if it may be right."""
    asked_s = time.time()
    return asked_s - float(machine.run(TELL_TIME).stdout)


def test_the_clock_is_right_after_standing_still(
    other_engine: Callable[[Path], Engine], portal: BlockingPortal, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that stood still with its clock is told the time: by a fork at once, otherwise within a while."""
    engine = other_engine(data_dir)
    machine = DrivenMachine.create(portal, engine)
    assert lag_s(machine) < NEAR_S

    async def stand_still() -> None:
        vm = machine.machine.vm  # type: ignore[attr-defined]  # of this engine
        await vm._order("stop")
        await anyio.sleep(STILL_S)  # what is tested is that this time passes
        await vm._order("cont")

    machine.call(stand_still)
    assert lag_s(machine) > STILL_S - 0.1
    for child in machine.fork():
        assert lag_s(child) < NEAR_S
        child.close()
    assert lag_s(machine) < NEAR_S
    portal.call(engine.aclose)
    monkeypatch.setattr(clocks, "LOOK_S", 0.1)
    monkeypatch.setattr(clocks, "DRIFT_S", 0.0)
    portal.call(engine.start)
    machine = DrivenMachine.create(portal, engine)
    machine.call(stand_still)
    deadline = time.monotonic() + 20
    while lag_s(machine) > NEAR_S:
        assert time.monotonic() < deadline


def test_a_stopped_hypervisor_loses_no_time(new_machine: Callable[..., DrivenMachine]) -> None:
    """While its hypervisor is stopped a machine does nothing; afterwards it goes on, and its clock is right."""
    machine = new_machine()
    pid = machine.host_pid
    machine.run("x = 1")
    os.kill(pid, signal.SIGSTOP)
    machine.start("print(x)")
    with pytest.raises(TimeoutError):
        machine.finish(timeout_s=STILL_S)
    os.kill(pid, signal.SIGCONT)
    assert machine.finish().stdout == "1\n"
    assert lag_s(machine) < NEAR_S


def test_a_full_disk_of_the_computer(
    other_engine: Callable[[Path], Engine], portal: BlockingPortal, data_dir: Path
) -> None:
    """A machine whose writes the computer's disk does not take ends and says so; a fork that has no room fails."""
    if os.geteuid() != 0:
        pytest.skip("a small file system to fill can only be mounted by root")
    if vms.vmm == "firecracker":
        pytest.skip("Firecracker copies what lies on another file system, and tells the guest alone of a full disk")
    small = data_dir / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m,mode=711", "tmpfs", small], check=True)
    try:
        engine = other_engine(small)
        machine = DrivenMachine.create(portal, engine)
        with pytest.raises(MachineFailed, match="No space left"):
            machine.fork()
        assert machine.run("print('on')").stdout == "on\n"
        machine.start(FILL)

        async def death() -> str:
            with anyio.fail_after(60):
                return (await machine.machine.wait_dead()).reason

        assert "the computer's disk is full" in machine.call(death)
        portal.call(engine.aclose)
        assert not list((small / "machines").iterdir())
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)
