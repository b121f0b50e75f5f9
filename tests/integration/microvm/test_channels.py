"""Promise: a VMM that ends a machine's conversations when it saves it costs nobody but file transfers under way."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import pytest
from anyio.from_thread import BlockingPortal

import cutting
import vms
from hosting import Host, running, text
from machines import DrivenMachine
from podflare.engines.base import EngineOptions
from podflare.engines.microvm.engine import MicrovmEngine
from podflare.engines.microvm.image.store import ImageStore
from podflare.errors import MachineFailed

pytestmark = list(vms.MARKS)


def options_of(folder: Path, store: ImageStore) -> EngineOptions:
    """Of an engine that may keep snapshots."""
    return EngineOptions(
        data_dir=str(folder), instance=folder.name, image_dir=str(store.root), snapshot_dir=f"{folder}/kept"
    )


@pytest.fixture(scope="module")
def engine(portal: BlockingPortal, private_temp: Path, image_store: ImageStore) -> Iterator[MicrovmEngine]:
    """One whose VMM cuts all channels of a VM that it saves."""
    vms.skip_without(*vms.PROGRAMS)
    vms.skip_where_they_would_boot_anew()
    vms.default_image(image_store)
    folder = Path(tempfile.mkdtemp(prefix="c", dir=private_temp))
    folder.chmod(0o711)

    async def make() -> MicrovmEngine:
        made = MicrovmEngine(options_of(folder, image_store), cutting.find)
        await made.start()
        await vms.boot(made)
        return made

    made = portal.call(make)
    yield made
    portal.call(made.aclose)


@pytest.fixture
def machine(portal: BlockingPortal, engine: MicrovmEngine) -> Iterator[DrivenMachine]:
    made = DrivenMachine.create(portal, engine)
    yield made
    made.close()


def test_forks_and_their_parent_go_on(machine: DrivenMachine) -> None:
    """Through generations and siblings: memory, what was printed between cells, and later cells of each are whole."""
    machine.run("x = [1]")
    started = "import threading, time\ndef late():\n    time.sleep(0.2); print('said late', flush=True)\n"
    machine.run(f"{started}thread = threading.Thread(target=late); thread.start()")
    machine.run("import os, subprocess; cat = subprocess.Popen(['cat'], stdin=-1, stdout=-1, text=True)")
    family = [machine]
    try:
        for generation in range(3):
            former = family[-1].machine.channel
            children = family[-1].fork(2)
            assert family[-1].machine.channel is not former and former.fileno() == -1
            children.pop().close()
            family += children
            assert family[-1].run(f"x.append({generation}); print(x)").stdout.endswith("]\n")
        for one in family:
            said = one.run(
                "thread.join(); cat.stdin.write('on\\n'); cat.stdin.flush(); print(cat.stdout.readline(), x)"
            )
            assert said.stdout.startswith("on\n") or said.stdout.startswith("said late\non\n"), said
            big = one.run("print('y' * 3_000_000)")
            assert len(big.stdout) == 3_000_001
        assert family[-1].run("print(x)").stdout == "[1, 0, 1, 2]\n"
        assert machine.run("print(x)").stdout == "[1]\n"
    finally:
        for one in family[1:]:
            one.close()


def test_kept_output_is_told_once_to_each(machine: DrivenMachine) -> None:
    """What background threads print between cells waits in the guest: each of both tells it after a fork, once."""
    machine.run(
        "import os, threading, time\ngo = threading.Event()\n"
        "def speak():\n    go.wait()\n    for n in range(2000): os.write(1, b'line %d\\n' % n)\n    done.set()\n"
        "done = threading.Event(); threading.Thread(target=speak).start()"
    )
    machine.run("threading.Timer(0.05, go.set).start()")
    [child] = machine.fork()
    try:
        wanted = "".join(f"line {n}\n" for n in range(2000))
        for one in (machine, child):
            said = one.run("done.wait(20); time.sleep(0)").stdout + one.run("pass").stdout
            assert said == wanted
    finally:
        child.close()


def test_a_fork_that_is_given_up_or_fails(machine: DrivenMachine, engine: MicrovmEngine) -> None:
    """Given up at any moment, or while a cell runs, it leaves no child and a parent that goes on."""
    for after_s in (0.0, 0.02, 0.05, 0.1, 0.2, 0.3):

        async def give_up(after_s: float = after_s) -> None:
            with anyio.move_on_after(after_s):
                for child in await machine.machine.fork(2, reseed=True, timeout_s=60):
                    with anyio.CancelScope(shield=True):
                        await child.aclose()

        machine.call(give_up)
        machine.rejoin()
        assert machine.run(f"print({after_s})").stdout == f"{after_s}\n"
    assert len(engine._machines) == 1
    machine.start("import time; time.sleep(0.5)")
    with pytest.raises(MachineFailed, match="a cell runs"):
        machine.fork()
    with pytest.raises(MachineFailed, match="a cell runs"):
        machine.snapshot("busy")
    machine.finish()
    assert engine.snapshots == ()


def test_a_snapshots_source_goes_on(machine: DrivenMachine, engine: MicrovmEngine, portal: BlockingPortal) -> None:
    """A running machine that is kept goes on, and so does what is restored from it, with all that runs in both."""
    machine.run("import threading; x = 1; stop = threading.Event(); threading.Thread(target=stop.wait).start()")
    machine.snapshot("mine")
    try:
        assert machine.run("x += 1; print(x, threading.active_count())").stdout == "2 2\n"
        twin = DrivenMachine(portal, portal.call(lambda: engine.restore("mine", timeout_s=60)))
        twin._channel = machine._channel
        assert twin.run("print(x, threading.active_count())").stdout == "1 2\n"
        twin.close()
    finally:
        engine.remove_snapshot("mine")


def test_a_machine_that_cannot_be_reached_again_says_so(
    machine: DrivenMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parent whose guest does not answer after a capture is ended, with the reason, and no child is left."""
    monkeypatch.setattr(cutting, "FALSE_STARTS", 1000)
    with pytest.raises(MachineFailed):
        machine.fork()
    death = machine.call(machine.machine.wait_dead)
    assert "saved and cannot be reached any more" in death.reason


@pytest.fixture
async def host(data_dir: Path, image_store: ImageStore) -> AsyncIterator[Host]:
    """A daemon on such an engine, which has booted already."""
    engine = MicrovmEngine(options_of(data_dir, image_store), cutting.find)
    async with running(data_dir, engine) as made:
        yield made


@pytest.mark.anyio
async def test_the_daemon_goes_on(engine: MicrovmEngine, host: Host) -> None:
    """Cells, forks, merges and snapshots go on over HTTP; an upload under way fails with what to do, then works."""
    parent = await host.create()
    assert (await host.exec(parent, "x = 1"))[-1]["type"] == "exit"
    path = f"/v1/sandboxes/{parent}/files"
    gate = asyncio.Event()

    async def slow_body() -> AsyncIterator[bytes]:
        yield b"x" * 100_000
        gate.set()
        await forked.wait()
        yield b"y"

    forked = asyncio.Event()
    async with anyio.create_task_group() as tasks:
        answers: list[tuple[int, str]] = []

        async def upload() -> None:
            answer = await host.client.put(path, params={"path": "/root/f"}, content=slow_body(), timeout=60)
            answers.append((answer.status_code, answer.text))

        tasks.start_soon(upload)
        await gate.wait()
        [child] = await host.fork(parent)
        forked.set()
    [(status, told)] = answers
    assert status >= 400 and "try again" in told
    assert (await host.client.put(path, params={"path": "/root/f"}, content=b"whole")).status_code < 300
    for one in (parent, child):
        said = text(await host.exec(one, "import os; x += 1; print(x, os.path.exists('/root/f'))"))
        assert said.strip() == f"2 {one == parent}"
    assert (await host.merge(parent, child)).status_code == 204
    kept = await host.client.post(f"/v1/sandboxes/{parent}/snapshots", json={"name": "kept"}, timeout=60)
    assert kept.status_code < 300, kept.text
    [again] = await host.fork(parent)
    for one in (again, parent):
        assert text(await host.exec(one, "print(x)")).strip() == "2"
        assert (await host.client.delete(f"/v1/sandboxes/{one}")).status_code < 300
