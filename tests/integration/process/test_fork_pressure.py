"""Forks where something runs out or dies: all children or none, nothing left behind, and the parent as it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import anyio
import httpx
import pytest

from machines import DrivenMachine
from podflare.engines.base import Limits, Machine
from podflare.errors import PodflareError
from podflare.wire.messages import DIED

MIB = 2**20
TIGHT = Limits(memory_bytes=160 * MIB, disk_bytes=64 * MIB, max_processes=48)
BIG_HEAP_BYTES = 1024 * MIB if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") > 8 << 30 else 128 * MIB


def machine_names(machine: DrivenMachine) -> set[str]:
    """Directories of machines and layers."""
    return set(os.listdir(machine.machine.directory.parent))


def repl_of(machine: DrivenMachine) -> int:
    agent = machine.machine.agent_pid
    return int(Path(f"/proc/{agent}/task/{agent}/children").read_text().split()[0])


@pytest.mark.parametrize("spare_mib", [8, 1])
def test_at_the_memory_limit(new_machine, fork, spare_mib):
    """A parent at 95 % of its memory limit is forked and keeps all it has; children write to all of it by themselves."""
    parent = new_machine(TIGHT)
    parent.run(f"hoard = [bytearray(b'x' * (1 << 20)) for _ in range({(TIGHT.memory_bytes >> 20) - 32})]")
    if "memory_limit" in parent.machine.walls:
        left = TIGHT.memory_bytes - parent.call(parent.machine.usage).memory_bytes
        parent.run(f"hoard += [bytearray(b'x' * (1 << 20)) for _ in range({(left >> 20) - spare_mib})]")
    before = machine_names(parent)
    look = "print(len(hoard), {one.count(b'x') for one in hoard})"
    seen = parent.run(look).stdout
    assert seen.endswith("{1048576}\n")
    try:
        one, two = fork(parent, 2)
    except PodflareError:
        assert machine_names(parent) == before
    else:
        # Each has a limit of its own, into which a copy of everything fits, and no second one.
        out = one.run("for some in hoard:\n    for at in range(0, len(some), 4096): some[at] = 1\nprint('all')")
        assert out.stdout == "all\n", out
        out = one.run("more = []\nwhile True: more.append(bytearray(b'y' * (1 << 20)))")
        assert out.exit.reason == DIED or out.error.name == "MemoryError"
        assert two.run(look).stdout == seen
    out = parent.run(look)
    # Pages that a forked parent writes to are copied, and the old ones count for it as long as a fork has them.
    assert out.stdout == seen or (spare_mib == 1 and "a new one was started" in out.stderr), out


def test_at_the_disk_limit(new_machine, fork):
    """A parent that has written nearly all it may is forked, and a child that writes too much ends alone."""
    parent = new_machine(TIGHT)
    parent.run("for n in range(14): open(f'/root/{n}', 'wb').write(bytes(4 << 20))")
    one, two = fork(parent, 2)
    one.start("import itertools\nfor n in itertools.count(): open(f'/root/more{n}', 'wb').write(bytes(8 << 20))")

    async def death():
        with anyio.fail_after(30):
            return await one.machine.wait_dead()

    assert one.call(death).out_of_disk
    look = "import os; print(len(os.listdir('/root')), sum(os.stat(f'/root/{n}').st_size for n in range(14)) >> 20)"
    for machine in (two, parent):
        assert machine.run(look).stdout == "14 56\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system for the daemon")
def test_with_the_file_system_of_the_daemon_full(data_dir):
    """If the copy of the parent's files does not fit the fork fails and says so, nothing is left, and later it works."""
    # In a mount namespace of the daemon: tests beside this one count mounts.
    serve = f"mount -t tmpfs -o size=64m,mode=711 none {data_dir} && exec {sys.executable} -m podflare serve"
    serve += f" --host 127.0.0.1 --port 0 --announce --data-dir {data_dir}/d --pool-size 0"
    daemon = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", serve], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        address = json.loads(daemon.stdout.readline())["address"]
        with httpx.Client(base_url=address, timeout=60) as client:
            parent = client.post("/v1/sandboxes").json()["id"]

            def run(code: str) -> str:
                return client.post(f"/v1/sandboxes/{parent}/exec", json={"code": code}).text

            run("import os; kept = 7; open('/root/big', 'wb').write(os.urandom(36 << 20))")
            used = free_bytes(daemon.pid, data_dir)
            refused = client.post(f"/v1/sandboxes/{parent}/fork", json={"n": 2})
            assert refused.status_code >= 500 and "No space left" in refused.json()["error"]
            assert len(client.get("/v1/sandboxes").json()["sandboxes"]) == 1
            assert free_bytes(daemon.pid, data_dir) >= used - MIB
            assert '"data":"7 37748736"' in run("print(kept, os.stat('/root/big').st_size)").replace('": ', '":')
            run("os.unlink('/root/big')")
            assert len(client.post(f"/v1/sandboxes/{parent}/fork", json={"n": 2}).json()["children"]) == 2
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.communicate(timeout=30)


def free_bytes(pid: int, path: Path) -> int:
    """Of the file system that a process sees at `path`."""
    status = os.statvfs(f"/proc/{pid}/root{path}")
    return status.f_bfree * status.f_frsize


@pytest.mark.parametrize("victim", ["repl", "agent"])
def test_while_the_parent_dies(new_machine, portal, victim):
    """Killed at any moment of its fork, REPL or agent, the fork ends soon, with all children or none; nothing is left.

    Children that were made have what the parent had: a new REPL in the place of the dead one is not forked instead.
    """
    neighbour = new_machine()
    neighbour.run("kept = 1")
    folder = neighbour.machine.directory.parent
    before = set(os.listdir(folder))

    async def forked_and_killed(parent: DrivenMachine, pid: int, after_s: float) -> list[Machine]:
        made: list[Machine] = []

        async def fork() -> None:
            with suppress(PodflareError):
                made.extend(await parent.machine.fork(3, reseed=True, timeout_s=20))

        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(fork)
                await anyio.sleep(after_s)  # the moment of the kill is what is varied here
                os.kill(pid, signal.SIGKILL)
        return made

    for step in range(14):
        parent = new_machine()
        parent.run("kept = 2; open('/root/f', 'w').write('x' * 1000)")
        pid = repl_of(parent) if victim == "repl" else parent.machine.agent_pid
        made = portal.call(forked_and_killed, parent, pid, step * 0.004)
        try:
            assert len(made) in (0, 3)
            if victim == "repl":  # with the agent dies whatever was forked below it
                assert [DrivenMachine(portal, child).run("print(kept)").stdout for child in made] == ["2\n"] * len(made)
        finally:
            for machine in (*made, parent.machine):
                portal.call(machine.aclose)
        assert set(os.listdir(folder)) == before
    (child,) = neighbour.fork()
    assert child.run("print(kept)").stdout == "1\n"
    child.close()


def test_with_a_big_heap(new_machine, fork):
    """A heap of a gigabyte is forked in well under a second, and none of it is copied."""
    parent = new_machine(Limits(memory_bytes=BIG_HEAP_BYTES + 512 * MIB, disk_bytes=2**30))
    parent.run(f"big = bytearray({BIG_HEAP_BYTES})\nfor at in range(0, len(big), 4096): big[at] = 7")
    begin = time.monotonic()
    children = fork(parent, 3)
    took = time.monotonic() - begin
    for child in children:
        child.run("big[0] = 8")
    private = [one.call(lambda one=one: one.machine.usage(detail=True)).private_memory_bytes for one in children]
    assert max(private) < 48 * MIB, private
    assert parent.run("print(big[0], big[-4096])").stdout == "7 7\n"
    assert took < 5, took  # others use this machine, too


def test_while_others_fork(new_machine, portal):
    """Machines of several families that fork at the same time get each their own children."""
    parents = [new_machine() for _ in range(4)]
    for number, parent in enumerate(parents):
        parent.run(f"mine = {number}; open('/root/f', 'w').write('{number}')")
    found: dict[int, list[DrivenMachine]] = {}

    async def all_at_once() -> None:
        async def one(number: int, parent: DrivenMachine) -> None:
            made[number] = await parent.machine.fork(3, reseed=True, timeout_s=60)

        async with anyio.create_task_group() as tasks:
            for number, parent in enumerate(parents):
                tasks.start_soon(one, number, parent)

    made: dict[int, tuple[object, ...]] = {}
    portal.call(all_at_once)
    try:
        for number, children in made.items():
            found[number] = [DrivenMachine(portal, child) for child in children]
            for child in found[number]:
                assert child.run("print(mine, open('/root/f').read())").stdout == f"{number} {number}\n"
        assert sorted(found) == [0, 1, 2, 3]
    finally:
        for children in made.values():
            for child in children:
                portal.call(child.aclose)


def test_at_the_process_limit(new_machine, fork):
    """Without room for one more process in the parent the fork works or fails whole, and works once there is room."""
    parent = new_machine(TIGHT)
    parent.run(
        "import subprocess\nsleepers = []\ntry:\n    while True: sleepers.append(subprocess.Popen(['sleep', '1000']))\nexcept OSError: pass"
    )
    before = machine_names(parent)
    try:
        fork(parent, 2)
    except PodflareError:
        assert machine_names(parent) == before
    assert parent.run("print(len(sleepers) > 10, {one.poll() for one in sleepers})").stdout == "True {None}\n"
    parent.run("for one in sleepers: one.kill(); one.wait()")
    (child,) = fork(parent)
    assert child.run("print(len(sleepers) > 10)").stdout == "True\n"


@pytest.mark.parametrize("after_s", [0.0, 0.004, 0.012, 0.025])
def test_a_parent_that_is_closed_during_a_fork(portal, new_machine, after_s):
    """Whether the fork comes to an end or not, nothing of it outlives parent and children."""
    parent = new_machine()
    before = machine_names(parent)
    parent.run("open('/root/f', 'w').write('x' * 10**6)")
    children: list[Machine] = []

    async def fork_and_close() -> None:
        async def fork() -> None:
            with suppress(PodflareError):
                children.extend(await parent.machine.fork(2, reseed=True, timeout_s=20))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fork)
            await anyio.sleep(after_s)  # the moment is what is varied here
            tasks.start_soon(parent.machine.aclose)
        for child in children:
            await child.aclose()

    portal.call(fork_and_close)
    assert machine_names(parent) <= before - {parent.machine.id}
