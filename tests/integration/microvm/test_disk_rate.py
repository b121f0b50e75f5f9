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
from podflare.wire.messages import Interrupt

pytestmark = list(vms.MARKS)
MIB = 1 << 20
OPERATIONS = 50
WRITE = """
import os, threading, time
def write(size, times, seconds=60):
    file = os.open("/root/written", os.O_CREAT | os.O_WRONLY | os.O_DSYNC)
    block, start, written = os.urandom(size), time.monotonic(), 0
    while time.monotonic() < start + seconds and written < times:
        os.pwrite(file, block, written * size)
        written += 1
    os.close(file)
    return written, time.monotonic() - start
"""
MANY = 1_000_000


@pytest.fixture
def held_engine(portal: BlockingPortal, image_store: ImageStore, data_dir: Path) -> Iterator[MicrovmEngine]:
    """An engine each of whose machines may write 1 MiB, and OPERATIONS times, in a second."""
    options = EngineOptions(str(data_dir), data_dir.name, disk_bytes_per_s=MIB, disk_operations_per_s=OPERATIONS)
    made = portal.call(vms.started_engine, options, image_store)
    yield made
    portal.call(made.aclose)


def wrote(machine: DrivenMachine, *what: float) -> tuple[int, float]:
    """How many blocks a machine writes, and in how many seconds."""
    count, took_s = machine.run(f"print(*write(*{what}))").stdout.split()
    return int(count), float(took_s)


def test_a_writer_is_held(
    portal: BlockingPortal, held_engine: MicrovmEngine, new_machine: Callable[..., DrivenMachine]
) -> None:
    """By bytes and by operations, and so is its fork, that is made while it writes; a machine beside it is not held
    up, and one without the limit is faster."""
    free = new_machine()
    held, beside = (DrivenMachine.create(portal, held_engine) for _ in range(2))
    for machine in (free, held, beside):
        assert machine.run(WRITE).exit.code == 0
    held.start(f"write({MIB}, 20)")  # 19 seconds
    assert wrote(beside, MIB // 16, 8)[0] == 8
    held.send(Interrupt())
    cell = held.finish()
    assert cell.error is not None and cell.error.name == "KeyboardInterrupt"
    # One second's worth at once, then by time, and the last one begun.
    for size, most in ((MIB, 1), (4096, OPERATIONS)):
        count, took_s = wrote(held, size, MANY, 0.3)
        assert count <= most * (1 + took_s) + 1
        free_count, free_took_s = wrote(free, size, 3 * most)
        assert free_count / free_took_s > count / took_s
    held.run(f"threading.Thread(target=write, args=({MIB}, 20)).start()")
    [child] = held.fork()
    count, took_s = wrote(child, MIB, MANY, 0.3)
    assert count <= 2 + took_s
    for machine in (held, beside, child):
        machine.close()
