"""The microvm engine: boot, create by restore, hot cell, forks, parent's pause, memory; creates from the pool, merges.

Measured below HTTP, which costs the same for every engine (create.py, hot_cell.py), but the last, which is a daemon's.
Needs an image (`podflare image build`); how fast it is hangs on the accelerator, which the first series names.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx
from anyio.from_thread import BlockingPortal, start_blocking_portal

from benchmarks.daemon import Daemon
from benchmarks.fork import merge_series
from benchmarks.series import Series
from podflare import Client, Sandbox
from podflare.engines.base import EngineOptions, Limits, MachineSpec
from podflare.engines.linux.ending import remove_tree
from podflare.engines.microvm.engine import MicrovmEngine, shape_of
from podflare.engines.microvm.images import Images
from podflare.engines.microvm.machine import MicrovmMachine, memory_of
from podflare.engines.microvm.origins import Origins
from podflare.engines.microvm.probe import find
from podflare.host.config import default_image_dir
from podflare.wire import frames
from podflare.wire.messages import Exec, Exit, from_guest, to_payload

MIB = 1 << 20
SPEC = MachineSpec("default", Limits(memory_bytes=512 * MIB, disk_bytes=1 << 30))
BOOT_TIMEOUT_S = 300.0
PENDING = "with KVM: pending"


def measure(full: bool) -> list[Series]:
    rounds = 20 if full else 6
    with tempfile.TemporaryDirectory(prefix="podflare-bench-") as folder, ExitStack() as stack:
        Path(folder).chmod(0o711)
        portal = stack.enter_context(start_blocking_portal())
        engine = portal.call(_start, EngineOptions(folder, Path(folder).name, image_dir=_images()))
        stack.callback(portal.call, engine.aclose)
        bench = _Bench(portal, engine)
        created = [bench.timed(lambda: engine.create(SPEC, timeout_s=BOOT_TIMEOUT_S)) for _ in range(rounds + 1)]
        parent = created[0][1]
        for _, machine in created[1:]:
            portal.call(machine.aclose)
        # The first one may have waited for the boot.
        found = [Series("microvm: create by restore", "ms", tuple(ms for ms, _ in created[1:]), f"<= 10 ms {PENDING}")]
        found.append(Series("microvm: hot cell", "ms", bench.cells(parent, 5 * rounds), f"<= 1 ms {PENDING}"))
        found = [*_boot(bench, Path(folder)), *found, *bench.forks(parent, rounds)]
    return [*found, *_from_pool(rounds)]


def _from_pool(rounds: int) -> list[Series]:
    """Creates at a daemon, one sandbox at a time, each when the pool is full; and merges there."""
    created, first_output = [], []
    with Daemon("--engine", "microvm", "--image-dir", _images()) as daemon, Client(daemon.url) as client:
        for _ in range(rounds + 1):
            while (pool := httpx.get(f"{daemon.url}/v1/capacity").json()["pool"])["ready"] < pool["size"]:
                daemon.settle()
            daemon.settle()
            started = perf_counter()
            with Sandbox(client=client) as sandbox:
                there = perf_counter()
                sandbox.run_code("print(1 + 1)")
                first_output.append((perf_counter() - started) * 1000)
                created.append((there - started) * 1000)
        merging = merge_series(daemon, rounds, engine="microvm: ")
    # The first one opens the connection.
    return [
        Series("microvm: create, pool hit", "ms", tuple(created[1:]), f"<= 10 ms {PENDING}"),
        Series("microvm: create to first output, pool hit", "ms", tuple(first_output[1:]), f"<= 10 ms {PENDING}"),
        merging,
    ]


def _images() -> str:
    return str(default_image_dir(os.environ))


async def _start(options: EngineOptions) -> MicrovmEngine:
    engine = MicrovmEngine(options)
    await engine.start()
    return engine


def _boot(bench: _Bench, folder: Path) -> list[Series]:
    """The template booted and saved as if for the first time."""
    found = find()
    assert found.vmm is not None
    origins = Origins(found.vmm, secrets.token_hex(8), folder)
    image = Images(_images()).get("default")
    shape = shape_of(SPEC.limits, cpus=1)
    taken, origin = bench.timed(lambda: origins.get(image, shape, SPEC.limits.disk_bytes))
    remove_tree(origin.disk.parent)
    return [Series("microvm: boot and save a template", "ms", (taken,), note=found.detail)]


class _Bench:
    """Machines of one engine, driven without a daemon."""

    def __init__(self, portal: BlockingPortal, engine: MicrovmEngine) -> None:
        self.portal, self.engine = portal, engine

    def timed(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> tuple[float, Any]:
        started = perf_counter()
        made = self.portal.call(work)
        return (perf_counter() - started) * 1000, made

    def cells(self, machine: MicrovmMachine, rounds: int) -> tuple[float, ...]:
        """Milliseconds of each of several small cells."""
        machine.channel.setblocking(True)
        try:
            taken = []
            for number in range(1, rounds + 4):
                started = perf_counter()
                _run(machine, number, "x = 1")
                taken.append((perf_counter() - started) * 1000)
            return tuple(taken[3:])
        finally:
            machine.channel.setblocking(False)

    def forks(self, parent: MicrovmMachine, rounds: int) -> list[Series]:
        goals = {1: f"<= 24 ms {PENDING}", 5: f"<= 50 ms {PENDING}", 32: ""}
        found, pauses, added = [], [], []
        for count, goal in goals.items():
            values = []
            for _ in range(rounds if count < 32 else 1):
                taken, children = self.timed(lambda n=count: parent.fork(n, reseed=True, timeout_s=BOOT_TIMEOUT_S))  # type: ignore[misc]
                values.append(taken)
                pauses.append(parent.pause_s * 1000)
                if count == 5:
                    added.append(_added_mib(children))
                self.portal.call(self._close, children)
            found.append(Series(f"microvm: fork({count})", "ms", tuple(values), goal))
        found.append(Series("microvm: pause of the parent", "ms", tuple(pauses), f"<= 15 ms {PENDING}"))
        return [*found, Series("microvm: memory that a child adds (PSS)", "MiB", tuple(added), "<= 45 MiB")]

    async def _close(self, machines: Sequence[MicrovmMachine]) -> None:
        for machine in machines:
            await machine.aclose()


def _added_mib(children: Sequence[MicrovmMachine]) -> float:
    return sum(memory_of(child.vm.pid)[0] for child in children) / len(children) / MIB


def _run(machine: MicrovmMachine, number: int, code: str) -> None:
    machine.channel.sendall(frames.encode(frames.MESSAGE, number, to_payload(Exec(code=code, name=f"<cell {number}>"))))
    decoder = frames.Decoder()
    while True:
        for frame in decoder.feed(machine.channel.recv(1 << 16)):
            if frame.kind == frames.MESSAGE and isinstance(from_guest(frame.payload), Exit):
                return
