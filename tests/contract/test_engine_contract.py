"""Promise: every engine keeps the contract of engines/base.py."""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import get_args

import anyio
import pytest

from machines import LIMITS
from podflare.engines.base import Death, MachineSpec, Usage, Wall
from podflare.errors import BadRequest, DeadlineExceeded, MachineFailed, NotBuilt, PodflareError, UnknownTemplate
from podflare.wire import frames
from podflare.wire.frames import Decoder
from podflare.wire.messages import Ready, from_guest
from podflare.wire.version import PROTOCOL

SPEC = MachineSpec("default", LIMITS)


def test_probe_starts_nothing_and_names_the_engine(new_engine, portal):
    """probe works on an engine that was not started, and speaks of walls by their names."""
    engine = new_engine
    report = portal.call(engine.probe)
    assert report.engine == engine.name
    assert report.usable
    assert {status.wall for status in report.walls} <= set(get_args(Wall))


def test_create_gives_a_machine_with_ready_unread(engine, portal):
    """A new machine has an id of its own, its spec, sorted walls, and a non-blocking channel with Ready to read."""

    async def check():
        first, second = await engine.create(SPEC, timeout_s=30), await engine.create(SPEC, timeout_s=30)
        try:
            assert first.id != second.id
            assert first.spec == SPEC
            assert first.walls == tuple(sorted(first.walls))
            assert set(first.walls) <= set(get_args(Wall))
            assert first.channel.type == socket.SOCK_STREAM
            assert not first.channel.getblocking()
            [frame] = Decoder().feed(first.channel.recv(4096))
            assert frame.channel == 0
            ready = from_guest(frame.payload)
            assert isinstance(ready, Ready)
            assert ready.protocol == PROTOCOL
        finally:
            await first.aclose()
            await second.aclose()

    portal.call(check)


def test_unknown_template(engine, portal):
    """A template that the engine does not have is refused with the name and what there is."""

    async def create():
        await engine.create(replace(SPEC, template="no-such"), timeout_s=10)

    with pytest.raises(UnknownTemplate, match=r"no-such.*default"):
        portal.call(create)


def test_create_in_no_time(engine, portal):
    """A create that cannot be ready in time raises DeadlineExceeded, and no machine is left."""

    async def create():
        await engine.create(SPEC, timeout_s=0.0001)

    with pytest.raises(DeadlineExceeded):
        portal.call(create)


@pytest.mark.parametrize("after_s", [0.0, 0.002, 0.02])
def test_cancelled_create_leaves_nothing(engine, portal, after_s):
    """A create that is cancelled at any moment leaves no machine behind."""

    async def create():
        with anyio.move_on_after(after_s):
            machine = await engine.create(SPEC, timeout_s=30)
            with anyio.CancelScope(shield=True):
                await machine.aclose()

    portal.call(create)


def test_engine_that_is_not_open_refuses(new_engine, portal):
    """create before start, and after aclose, is an error of ours; aclose twice is none."""
    engine = new_engine

    async def create():
        await engine.create(SPEC, timeout_s=10)

    with pytest.raises(PodflareError):
        portal.call(create)
    portal.call(engine.start)
    portal.call(engine.aclose)
    portal.call(engine.aclose)
    with pytest.raises(PodflareError):
        portal.call(create)


def test_engine_closes_its_machines(new_engine, portal):
    """aclose of an engine ends machines that nobody closed."""
    engine = new_engine
    portal.call(engine.start)

    async def check():
        machine = await engine.create(SPEC, timeout_s=30)
        await engine.aclose()
        with anyio.fail_after(20):
            assert isinstance(await machine.wait_dead(), Death)
        await machine.aclose()

    portal.call(check)


def test_close_is_idempotent_and_all_waiters_hear_of_it(engine, portal):
    """aclose may be called any number of times, at once too; every waiter gets the death; the channel is closed."""

    async def check():
        machine = await engine.create(SPEC, timeout_s=30)
        deaths = []

        async def wait():
            deaths.append(await machine.wait_dead())

        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(wait)
                for _ in range(3):
                    group.start_soon(machine.aclose)
        assert len(deaths) == 3
        assert all(death.reason for death in deaths)
        await machine.aclose()
        assert machine.channel.fileno() == -1
        assert isinstance(await machine.wait_dead(), Death)

    portal.call(check)


def test_close_is_shielded(engine, portal):
    """A close whose caller is cancelled closes all the same."""

    async def check():
        machine = await engine.create(SPEC, timeout_s=30)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await machine.aclose()
        with anyio.fail_after(20):
            await machine.wait_dead()

    portal.call(check)


def test_machine_that_dies_by_itself(engine, portal):
    """When the guest ends, the channel ends, wait_dead returns a reason, and closing it is still fine."""

    async def check():
        machine = await engine.create(SPEC, timeout_s=30)
        try:
            machine.channel.send(b"\xff" * 64)  # no frame: the agent gives up on such a host
            with anyio.fail_after(20):
                death = await machine.wait_dead()
            assert death.reason
            assert not death.out_of_memory
        finally:
            await machine.aclose()

    portal.call(check)


def test_limits_and_usage(engine, portal):
    """Limits can be replaced while the machine lives, or it says that it cannot, and not after; usage never raises."""

    async def check():
        machine = await engine.create(SPEC, timeout_s=30)
        more = replace(LIMITS, memory_bytes=LIMITS.memory_bytes * 2)
        try:
            await machine.set_limits(more)
            assert machine.spec.limits == more
        except MachineFailed:
            # rlimits, which hold them where no control group does, cannot be raised by an ordinary user.
            assert "memory_limit" not in machine.walls
            assert machine.spec.limits == LIMITS
        for detail in (False, True):
            assert isinstance(await machine.usage(detail=detail), Usage)
        await machine.aclose()
        for detail in (False, True):
            assert isinstance(await machine.usage(detail=detail), Usage)
        with pytest.raises(MachineFailed):
            await machine.set_limits(LIMITS)

    portal.call(check)


def test_what_an_engine_does_not_claim_it_refuses(engine, portal):
    """An operation that is no capability of the engine is answered NotBuilt, and one that is does something else."""

    async def check():
        machine = await engine.create(SPEC, timeout_s=30)
        operations = {
            "fork": lambda: machine.fork(1, reseed=True, timeout_s=30),
            "diff": lambda: machine.diff(machine, ("/root",), detail=False, timeout_s=30),
            "snapshot": lambda: machine.snapshot("not/a/name", timeout_s=30),
        }
        try:
            for capability, operation in operations.items():
                try:
                    made = await operation()
                except NotBuilt:
                    assert capability not in engine.capabilities
                except PodflareError:
                    assert capability in engine.capabilities
                else:
                    assert capability in engine.capabilities
                    for child in made if capability == "fork" else ():
                        await child.aclose()
        finally:
            await machine.aclose()

    portal.call(check)


def test_a_snapshot_that_there_is_not(engine, portal):
    """What is asked of an unknown snapshot is refused: by an engine that keeps none as NotBuilt."""
    expected = BadRequest if "snapshot" in engine.capabilities else NotBuilt
    assert "none" not in engine.snapshots
    for ask in (engine.describe_snapshot, engine.remove_snapshot):
        with pytest.raises(expected):
            ask("none")
    with pytest.raises(expected):
        portal.call(lambda: engine.restore("none", timeout_s=30))


def test_machines_do_not_share_state(new_machine):
    """Variables, working directory and background processes of one machine are not another's."""
    one, two = new_machine(), new_machine()
    one.run("mark = 'one'; import os; os.chdir('/')")
    assert (
        two.run("print('mark' in globals(), os.getcwd() == '/' if 'os' in globals() else False)").stdout
        == "False False\n"
    )


def test_interleaved_machines_get_their_own_output(new_machine, part):
    """Machines that run at the same time each give their own output, in order."""
    machines = [new_machine() for _ in range(8 if part == 1 else 3)]
    for number, machine in enumerate(machines):
        machine.start(f"for i in range({2000 // part}): print({number}, i)")
    for number, machine in enumerate(machines):
        assert machine.finish().stdout == "".join(f"{number} {i}\n" for i in range(2000 // part))


def test_machines_come_and_go(engine, portal, part):
    """Machines made and closed at the same time leave nothing (the leak check around every test proves it)."""

    async def one():
        machine = await engine.create(SPEC, timeout_s=30)
        assert machine.channel.recv(4096)[4] == frames.MESSAGE
        await machine.aclose()

    async def check():
        for _ in range(4 if part == 1 else 1):
            async with anyio.create_task_group() as group:
                for _ in range(5):
                    group.start_soon(one)

    portal.call(check)
