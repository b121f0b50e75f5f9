"""Promise: a virtual machine writes no more in a second than its daemon allows, and nobody else notices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from anyio.from_thread import BlockingPortal

import vms
from machines import DrivenMachine
from podflare.engines.base import EngineOptions
from podflare.engines.microvm.engine import MicrovmEngine
from podflare.engines.microvm.image.store import ImageStore

pytestmark = list(vms.MARKS)
MIB = 1 << 20
OPERATIONS = 50
WRITE = """
import os, threading, time
def write(size, times=1000000):
    file = os.open("/root/written", os.O_CREAT | os.O_WRONLY | os.O_DSYNC)
    block, start, written = os.urandom(size), time.monotonic(), 0
    while time.monotonic() < start + 0.3 and written < times:
        os.pwrite(file, block, written * size)
        written += 1
    os.close(file)
    return written, time.monotonic() - start
"""


@pytest.fixture
def held_engine(portal: BlockingPortal, image_store: ImageStore, data_dir: Path) -> Iterator[MicrovmEngine]:
    """An engine each of whose machines may write 1 MiB, and OPERATIONS times, in a second."""
    options = EngineOptions(str(data_dir), data_dir.name, disk_bytes_per_s=MIB, disk_operations_per_s=OPERATIONS)
    made = portal.call(vms.started_engine, options, image_store)
    yield made
    portal.call(made.aclose)


def written(machine: DrivenMachine, size: int) -> tuple[int, float]:
    """How many blocks a machine writes, and in how many seconds."""
    count, took_s = machine.run(f"print(*write({size}))").stdout.split()
    return int(count), float(took_s)


def test_a_writer_is_held(
    portal: BlockingPortal, held_engine: MicrovmEngine, new_machine: Callable[..., DrivenMachine]
) -> None:
    """By bytes and by operations, and so is its fork, that is made while it writes; a machine beside it is not held
    up, and one without the limit does many times as much."""
    free = new_machine()
    held, beside = (DrivenMachine.create(portal, held_engine) for _ in range(2))
    for machine in (free, held, beside):
        assert machine.run(WRITE).exit.code == 0
    held.start(f"print(*write({MIB}))")
    assert beside.run("print(write(1 << 16, 8)[0])").stdout == "8\n"
    count, took_s = (float(word) for word in held.finish().stdout.split())
    assert count <= 2 + took_s  # one second's worth at once, then by time, and the last one begun
    assert written(free, MIB)[0] > 3 * count
    count, took_s = written(held, 4096)
    assert count <= OPERATIONS * (1 + took_s) + 1
    assert written(free, 4096)[0] > count
    held.run(f"threading.Thread(target=write, args=({MIB},)).start()")
    [child] = held.fork()
    count, took_s = written(child, MIB)
    assert count <= 2 + took_s
    for machine in (held, beside, child):
        machine.close()
