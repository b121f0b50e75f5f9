"""Promise: machines of the microvm engine are forked, kept, limited and ended with all that runs in them."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import anyio
import pytest
from anyio.from_thread import BlockingPortal

import vms
from daemons import served
from machines import LIMITS, DrivenMachine
from podflare import Sandbox, close_default_client
from podflare.engines.base import EngineOptions
from podflare.engines.microvm.engine import MicrovmEngine
from podflare.engines.microvm.image.store import Image, ImageStore
from podflare.errors import BadRequest, Conflict, MachineFailed
from podflare.wire import frames
from podflare.wire.messages import Ack, DataEnd, FileDone, FileWrite, from_guest, to_payload

pytestmark = list(vms.MARKS)


@pytest.fixture
def machine(new_machine: Callable[..., DrivenMachine]) -> DrivenMachine:
    """One machine."""
    return new_machine()


@pytest.fixture
def fork() -> Iterator[Callable[..., list[DrivenMachine]]]:
    """fork(machine, count) -> its forks, closed at the end of the test."""
    made: list[DrivenMachine] = []

    def do(machine: DrivenMachine, count: int = 1, *, reseed: bool = True) -> list[DrivenMachine]:
        made.extend(machine.fork(count, reseed=reseed))
        return made[-count:]

    yield do
    for one in made:
        one.close()


ALL_THAT_RUNS = """
import os, random, socket, subprocess, threading, time
ticks = []
def tick():
    while True:
        time.sleep(0.02)
        ticks.append(len(ticks))
threading.Thread(target=tick, daemon=True).start()
process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
one, other = socket.socketpair()
lost = open("/root/lost", "w+"); lost.write("deleted"); lost.flush(); os.unlink("/root/lost")
random.seed(1)
"""
LOOK = """
before = len(ticks)
while len(ticks) == before: time.sleep(0.01)
process.stdin.write("echo\\n"); process.stdin.flush()
one.send(b"through")
lost.seek(0)
print(process.stdout.readline().strip(), other.recv(9).decode(), lost.read())
print(os.uname().nodename, open("/etc/machine-id").read().strip(), os.urandom(8).hex(), random.random())
print(time.time())
"""


def test_a_fork_has_all_that_runs(machine: DrivenMachine, fork: Callable[..., list[DrivenMachine]]) -> None:
    """Threads, processes, sockets and deleted files go on in each fork and in the parent; names, clock and randomness
    are each one's own, and nothing is told to be lost."""
    machine.run(ALL_THAT_RUNS)
    family = [machine, *fork(machine, 2)]
    own = []
    for one in family:
        carried, identity, clock = one.run(LOOK).stdout.splitlines()
        assert carried == "echo through deleted"
        assert abs(float(clock) - time.time()) < 30
        own.append(identity.split())
        assert one.machine.fork_report == {}
    for column in zip(*own, strict=True):
        assert len(set(column)) == len(family)
    machine.run("open('/etc/machine-id', 'a').write('more')")
    look = "print(random.random(), len(open('/etc/machine-id').read()))"
    [drawn] = {one.run(look).stdout for one in fork(machine, 2, reseed=False)}
    assert drawn.split()[1] == "33"
    assert machine.machine.pause_s < 10  # type: ignore[attr-defined]  # of this engine


def test_a_transfer_under_way_is_the_parents(machine: DrivenMachine, fork: Callable[..., list[DrivenMachine]]) -> None:
    """A file that is being written while its machine is forked arrives in the parent, and in the fork not at all."""
    if not machine.machine.vm.channels_survive:  # type: ignore[attr-defined]  # of this engine
        pytest.skip("this VMM ends the transfers of a machine that is saved, which test_channels.py is about")
    channel = machine._channel = 50
    whole = frames.encode(frames.DATA, channel, b"x" * 50_000)
    machine.send(FileWrite("whole"))  # type: ignore[arg-type]  # any message of the host
    machine._send_all(whole[:20_000])
    [child] = fork(machine)
    machine._send_all(whole[20_000:] + frames.encode(frames.MESSAGE, channel, to_payload(DataEnd())))
    message = from_guest(machine._next(30).payload)
    while isinstance(message, Ack):
        message = from_guest(machine._next(30).payload)
    assert message == FileDone(50_000)
    machine._channel = child._channel = 60
    look = "import os; print([name for name in os.listdir() if os.path.getsize(name) or name.startswith('.p')])"
    assert (machine.run(look).stdout, child.run(look).stdout) == ("['whole']\n", "[]\n")


def test_a_fork_that_is_given_up(machine: DrivenMachine) -> None:
    """A fork that is cancelled at any moment leaves no child, and a parent that goes on."""
    for after_s in (0.0, 0.02, 0.1, 0.2, 0.3, 0.35, 0.4, 0.45):

        async def give_up(after_s: float = after_s) -> None:
            with anyio.move_on_after(after_s):
                for child in await machine.machine.fork(2, reseed=True, timeout_s=60):
                    with anyio.CancelScope(shield=True):
                        await child.aclose()

        machine.call(give_up)
        machine.rejoin()
        assert machine.run(f"print({after_s})").stdout == f"{after_s}\n"
    folder = machine.machine.directory.parent  # type: ignore[attr-defined]  # of this engine
    wait_until(lambda: [path.name for path in folder.iterdir()] == [machine.machine.id])


def test_limits_hold_inside(new_machine: Callable[..., DrivenMachine]) -> None:
    """Memory, disk and processes above their limits cost the sandbox's own code alone: the machine goes on."""
    machine = new_machine(replace(LIMITS, memory_bytes=256 << 20, max_processes=40))
    cell = machine.run("block = bytearray(400 << 20)")
    assert cell.exit.restarted
    assert machine.call(machine.machine.usage).oom_kills >= 1
    cell = machine.run(
        f"import os\nfd = os.open('big', os.O_CREAT | os.O_WRONLY)\nos.posix_fallocate(fd, 0, {LIMITS.disk_bytes})"
    )
    assert "No space left" in cell.stderr
    cell = machine.run("import subprocess\nall = [subprocess.Popen(['sleep', '100']) for _ in range(60)]")
    assert cell.error is not None and cell.error.name == "BlockingIOError"
    assert machine.run("print('on')").stdout == "on\n"


def test_the_wall(machine: DrivenMachine, portal: BlockingPortal) -> None:
    """A machine has no interface but loopback and no capability; its hypervisor is confined, as the walls say."""
    look = "import os\nfor path in ('class/net', 'fs/cgroup'): print(os.listdir(f'/sys/{path}'))"
    look += "\nprint(os.path.exists('/dev/vda'))"
    assert machine.run(look).stdout == "['lo']\n[]\nFalse\n"
    assert machine.run("grep CapEff /proc/self/status", "bash").stdout.split()[1] == "0" * 16
    assert {"hypervisor", "memory_limit", "disk_limit", "seccomp", "no_new_privileges"} <= set(machine.machine.walls)
    if os.geteuid() == 0:
        pid = machine.machine.vm.pid  # type: ignore[attr-defined]  # of this engine
        assert Path(f"/proc/{pid}").stat().st_uid == 0x7001_0000
        assert {"separate_uid", "network_namespace", "dropped_capabilities"} <= set(machine.machine.walls)


def test_a_translated_kernel_guards_against_no_flaws(machine: DrivenMachine, engine: MicrovmEngine) -> None:
    """Where instructions are translated, system calls do not pay for flaws of processors; under KVM the guards stay."""
    translated = engine._ready()[0].vmm.accelerator == "tcg"
    assert ("mitigations=off" in machine.run("cat /proc/cmdline", "bash").stdout.split()) == translated
    meltdown = machine.run("cat /sys/devices/system/cpu/vulnerabilities/meltdown", "bash").stdout
    assert not translated or "Mitigation" not in meltdown


def test_the_end_of_a_hypervisor(machine: DrivenMachine) -> None:
    """A machine whose hypervisor ends says so at once; what is asked of it afterwards fails clearly."""
    vmm = machine.machine.vm  # type: ignore[attr-defined]  # of this engine
    os.kill(vmm.pid, signal.SIGKILL)
    death = machine.call(machine.machine.wait_dead)
    assert any(f"{vmm} ended by signal 9" in death.reason for vmm in ("QEMU", "Firecracker"))
    for ask in (lambda: machine.machine.fork(1, reseed=True, timeout_s=5), lambda: machine.machine.set_limits(LIMITS)):
        with pytest.raises(MachineFailed, match="gone"):
            machine.call(ask)


def test_what_differs(machine: DrivenMachine, fork: Callable[..., list[DrivenMachine]]) -> None:
    """A comparison tells files that came, went and changed, the image's too, sizes and patches, while a cell runs."""
    machine.run("open('kept', 'w').write('same'); open('text', 'w').write('one\\n'); open('gone', 'w').write('')")
    [child] = fork(machine)
    child.run("import os\nopen('text', 'w').write('two\\n'); os.unlink('gone'); os.symlink('/', 'link')")
    child.run("os.unlink('/usr/bin/wget') if os.path.exists('/usr/bin/wget') else None; os.unlink('/usr/bin/curl')")
    child.run("text = open('/etc/hosts').read(); open('/etc/hosts', 'w').write(text.upper())")
    machine.start("while True: pass")
    ask = machine.machine.diff(child.machine, ("/etc",), detail=False, timeout_s=60)
    assert machine.call(lambda: ask).modified == ("/etc/hosts", "/etc/machine-id")
    ask = machine.machine.diff(child.machine, ("/root", "/usr/bin"), detail=True, timeout_s=60)
    found = machine.call(lambda: ask)
    assert (found.added, found.modified) == (("/root/link",), ("/root/text",))
    assert found.removed == ("/root/gone", "/usr/bin/curl")
    change = found.detail["/root/text"]
    assert (change.kind, change.size_before, change.size_after) == ("file", 4, 4)
    assert "-one\n+two\n" in change.patch


def test_a_snapshot_outlives_its_engine(
    portal: BlockingPortal, image_store: ImageStore, data_dir: Path, image: Image
) -> None:
    """A machine that was kept goes on in another engine, twice, each for itself; removing it ends neither."""

    async def start(name: str) -> MicrovmEngine:
        folder = data_dir / name
        folder.mkdir(mode=0o711)
        options = EngineOptions(data_dir=str(folder), instance=f"{data_dir.name}{name}")
        return await vms.started_engine(replace(options, snapshot_dir=str(data_dir / "kept")), image_store)

    first = portal.call(start, "a")
    machine = DrivenMachine.create(portal, first)
    machine.run("import threading, time; x = [1]; stop = threading.Event(); threading.Thread(target=stop.wait).start()")
    machine.snapshot("mine")
    assert machine.run("x.append(2); print(x)").stdout == "[1, 2]\n"
    portal.call(first.aclose)
    second = portal.call(start, "b")
    try:
        assert second.snapshots == ("mine",)
        twins = [DrivenMachine(portal, portal.call(lambda: second.restore("mine", timeout_s=60))) for _ in range(2)]
        second.remove_snapshot("mine")
        for number, twin in enumerate(twins):
            twin._channel = 9
            assert twin.run(f"x.append({number}); print(x, threading.active_count())").stdout == f"[1, {number}] 2\n"
        with pytest.raises(BadRequest, match="no snapshot"):
            portal.call(lambda: second.restore("mine", timeout_s=5))
    finally:
        portal.call(second.aclose)


def test_the_daemons_end_is_its_machines_end(data_dir: Path, image: Image) -> None:
    """When a daemon of two engines is killed the machines of both end with it, and the next clears what they left."""
    words = ("--engine", "microvm", "--engine", "process", "--image-dir", str(image.directory.parent.parent))
    with pytest.raises(AssertionError), served(data_dir, *words) as daemon:
        vms.boot_over_http(daemon.url)
        machine, branch = Sandbox(host=daemon.url), Sandbox(host=daemon.url, engine="process")
        assert [one.info().engine for one in (machine, branch)] == ["microvm", "process"]
        assert [one.run_code("print(1)").stdout for one in (machine, branch)] == ["1", "1"]
        with pytest.raises(Conflict, match="engine"):
            machine.diff(branch)
        children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
        watched = [os.pidfd_open(int(pid)) for pid in children]
        os.kill(daemon.pid, signal.SIGKILL)
        for pidfd in watched:
            wait_for_end(pidfd)
    close_default_client()
    machines = data_dir / "d" / "instances"
    assert {path.parent.parent.name for path in machines.glob("*/*/machines/*")} == {"microvm", "process"}
    with served(data_dir, "--engine", "process") as daemon:  # who reaps need not be of the same engines
        assert Sandbox.list(host=daemon.url) == []
        wait_until(lambda: len(list(machines.iterdir())) == 1)
        assert not list(machines.glob("*/*/machines/*"))
    close_default_client()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)  # a condition that has no event


def wait_for_end(pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(20_000)
    os.close(pidfd)
