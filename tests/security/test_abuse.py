"""Promise: a sandbox that takes all it can hurts itself alone, gets a clear end, and can go on where that is possible."""

from __future__ import annotations

import os
import time

import anyio
import pytest

from machines import DrivenMachine
from podflare.engines.base import Limits
from podflare.wire.messages import DIED, ENDED, INTERRUPTED, Interrupt, Kill

SMALL = Limits(memory_bytes=192 * 2**20, disk_bytes=96 * 2**20, max_processes=64)


def assert_alive(machine: DrivenMachine) -> None:
    """The machine runs a cell of each language."""
    assert machine.run("print(1 + 1)").stdout == "2\n"
    assert machine.run("echo shell", "bash").stdout == "shell\n"


@pytest.mark.any_engine
@pytest.mark.parametrize("language", ["python", "bash"])
def test_fork_bomb_is_bounded_and_ended(new_machine, language):
    """Forking without end stops at the process limit, and one kill ends all of it."""
    machine = new_machine(SMALL)
    bombs = {
        "python": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "bash": "bomb() { bomb | bomb & }; bomb; while true; do bomb; done 2>/dev/null",
    }
    machine.start(bombs[language], language)
    wait_until(lambda: processes(machine) > 30, "the bomb to grow")
    assert processes(machine) <= 64 + 3
    machine.send(Interrupt())
    machine.send(Kill())
    out = machine.finish()
    assert out.exit.reason in (DIED, INTERRUPTED, ENDED)
    wait_until(lambda: processes(machine) <= 4, "the bomb's processes to be gone")
    assert_alive(machine)


@pytest.mark.any_engine
def test_memory_without_end(new_machine):
    """Allocating without end ends that process or raises MemoryError; the sandbox goes on and its neighbour is untouched."""
    machine, neighbour = new_machine(SMALL), new_machine(SMALL)
    neighbour.run("kept = bytearray(1 << 20)")
    out = machine.run("hoard = []\nwhile True: hoard.append(bytearray(1 << 20))")
    if out.exit.reason == DIED:
        assert out.exit.restarted
        assert machine.call(machine.machine.usage).oom_kills >= 1
    else:
        assert out.error is not None
        assert out.error.name == "MemoryError"
        machine.run("del hoard")
    assert_alive(machine)
    assert neighbour.run("print(len(kept))").stdout == f"{1 << 20}\n"


def test_one_huge_file_is_refused(new_machine):
    """A single file cannot grow past the disk limit: the write fails with an error that Python shows."""
    machine = new_machine(SMALL)
    out = machine.run("f = open('/root/big', 'wb')\nfor _ in range(200): f.write(bytes(1 << 20)); f.flush()")
    assert out.error is not None
    assert out.error.name == "OSError"
    assert_alive(machine)


FILL = {
    "many files": "import itertools\nfor i in itertools.count(): open(f'/root/{i}', 'wb').write(bytes(4 << 20))",
    "files deeper than a path is long": """
import itertools, os
os.chdir('/root')
for _ in range(20): os.mkdir('x' * 250); os.chdir('x' * 250)
for i in itertools.count(): open(f'{i}', 'wb').write(bytes(4 << 20))
""",
    "files in directories that are closed": """
import itertools, os
for i in itertools.count():
    os.mkdir(f'/root/{i}'); open(f'/root/{i}/x', 'wb').write(bytes(4 << 20)); os.chmod(f'/root/{i}', 0)
""",
    "files that are removed and open": """
import os
kept = []
while True:
    kept.append(open('/root/x', 'wb')); os.unlink('/root/x'); kept[-1].write(bytes(4 << 20)); kept[-1].flush()
""",
    "files beside links that lead away": """
import itertools, os
os.symlink('/proc', '/root/p'); os.symlink('.', '/root/loop')
for i in itertools.count(): open(f'/root/{i}', 'wb').write(bytes(4 << 20))
""",
    "empty files without end": """
import itertools, os
for i in itertools.count():
    os.mkdir(f'/root/{i}')
    for n in range(1000): os.symlink('x', f'/root/{i}/{n}')
""",
}


def test_filling_the_disk_ends_the_machine(new_machine, record):
    """Whatever way a machine fills the disk ends it alone, soon, and its death says so and names the limit."""
    neighbour = new_machine(SMALL)
    small = Limits(memory_bytes=192 * 2**20, disk_bytes=16 * 2**20, max_processes=64)
    attackers = {name: new_machine(small) for name in FILL}
    for name, machine in attackers.items():
        machine.start(FILL[name])
    found = {}
    for name, machine in attackers.items():
        try:
            death = machine.call(_death, machine.machine)
            found[name] = "held" if death.out_of_disk and "rootfs_gb" in death.reason else f"broke: {death}"
        except TimeoutError:
            found[name] = "broke: it goes on writing"
    assert_alive(neighbour)
    record(found)


async def _death(machine):
    with anyio.fail_after(30):
        return await machine.wait_dead()


@pytest.mark.parametrize(("code", "reason"), [
    ("import os; os._exit(0)", DIED),
    ("import os; os._exit(7)", DIED),
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", DIED),
    ("import ctypes; ctypes.string_at(0)", DIED),
    ("import os; os.closerange(0, 51); print('gone')", ENDED),
    ("import sys; sys.stdout = sys.stderr = None; print('x')", ENDED),
    ("import sys; sys.stdout.close(); sys.__stdout__.close()", ENDED),
    ("import builtins; builtins.print = None; del builtins.len", None),
    ("import sys; sys.modules.clear()", None),
    ("import threading, os; threading.Thread(target=lambda: os._exit(3)).start(); import time; time.sleep(30)", DIED),
    ("import os, signal; os.kill(os.getppid(), signal.SIGKILL); os.kill(1, 9)", ENDED),
    ("import signal; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]", ENDED),
    ("import sys; sys.setrecursionlimit(10**6)\ndef f(): f()\nf()", None),
    ("import gc\nfor o in gc.get_objects():\n    if isinstance(o, dict) and o is not globals():\n        try: o.clear()\n        except Exception: pass", None),
])  # fmt: skip
@pytest.mark.any_engine
def test_a_cell_that_breaks_its_interpreter(attacker, code, reason):
    """Whatever a cell does to its own interpreter, its call ends and the next cell runs."""
    out = attacker.run(code, timeout_s=110)  # a million frames take their time where instructions are translated
    if reason is not None:
        assert out.exit.reason == reason, out
    if out.exit.reason == DIED:
        assert out.exit.restarted
        assert out.stderr
    attacker.run("pass")  # a REPL broken beyond use may need one more death to be started anew
    assert_alive(attacker)


@pytest.mark.both_engines
def test_output_that_looks_like_frames_is_output(attacker):
    """Bytes of the guest protocol on stdout and stderr arrive as those bytes and change nothing."""
    out = attacker.run("""
import os, struct
body = b'{"op":"exit","code":0,"reason":"ended","restarted":false,"signal":0}'
frame = struct.pack(">IBI", len(body), 1, 1) + body
for fd in (1, 2): os.write(fd, frame * 3)
print("after")
""")
    assert out.stdout.count('"op":"exit"') == 3
    assert out.stdout.endswith("after\n")
    assert_alive(attacker)


@pytest.mark.both_engines
def test_garbage_on_every_descriptor(attacker):
    """Writing garbage to every descriptor that can be found breaks at most this sandbox's interpreter."""
    attacker.run("""
import os
for fd in range(3, 4096):
    try: os.write(fd, os.urandom(9000))
    except (OSError, BlockingIOError): pass
""")
    attacker.run("pass")
    assert_alive(attacker)


@pytest.mark.any_engine
def test_a_flood_of_output_is_taken_in_full_and_in_order(attacker, engine_name):
    """64 MiB of lines come through the channel complete and in order, and the agent's memory stays as it was."""
    count, most_kib = (1 << 16, 64 << 10) if engine_name == "process" else (1 << 14, 512 << 10)
    out = attacker.run(f"import sys\nfor i in range({count}): sys.stdout.write(f'{{i:07d}} ' + 'x' * 1015 + '\\n')")
    lines = out.stdout.splitlines()
    assert [int(line[:7]) for line in lines] == list(range(count))
    with open(f"/proc/{attacker.host_pid}/status") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    assert peak < most_kib


def processes(machine: DrivenMachine) -> int:
    """Processes below the machine's agent, counted from outside; in a virtual machine by its kernel."""
    if "hypervisor" in machine.machine.walls:
        return int(machine.call(machine.machine.usage).processes)
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                continue
            parents.setdefault(parent, []).append(int(name))
    found, wave = 0, [machine.machine.agent_pid]
    while wave:
        found += len(wave)
        wave = [child for pid in wave for child in parents.get(pid, [])]
    return found


def wait_until(condition, what: str, timeout_s: float = 20) -> None:
    """Poll `condition`, which has no event of its own."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.01)
