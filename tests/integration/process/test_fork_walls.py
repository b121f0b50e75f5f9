"""Nothing that one branch does reaches another one, and a fork that goes wrong leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from podflare.errors import IsolationIncomplete, MachineFailed


def test_signals_of_a_child_stay_in_it(parent, fork):
    """kill -9 -1, pkill and kill of every pid in one branch end nothing in its parent and siblings."""
    parent.run("import subprocess; sleeper = subprocess.Popen(['sleep', '1000']); kept = 1")
    one, two = fork(parent, 2)
    one.run("""
import os, signal
for pid in range(2, 5000):
    if pid != os.getpid():
        try: os.kill(pid, signal.SIGKILL)
        except OSError: pass
""")
    one.run("pkill -9 -f python; kill -9 -1", "bash")
    assert parent.run("print(kept, sleeper.poll())").stdout == "1 None\n"
    assert two.run("print(kept)").stdout == "1\n"
    assert one.run("print(1)").stdout == "1\n"


ATTACKS = {
    "kill": "os.kill(pid, 9)",
    "kill of the group": "os.kill(-pid, 9)",
    "tgkill": "libc.syscall(234, pid, pid, 9)",
    "tkill": "libc.syscall(200, pid, 9)",
    "rt_sigqueueinfo": "libc.syscall(129, pid, 9, struct.pack('iii116x', 9, 0, -1))",
    "pidfd": "signal.pidfd_send_signal(os.pidfd_open(pid), 9)",
    "a directory of /proc": "signal.pidfd_send_signal(os.open(f'/proc/{pid}', os.O_RDONLY), 9)",
    "an owner of a descriptor": "fcntl.fcntl(r, fcntl.F_SETOWN, pid); arm()",
    "an owner given in memory": "fcntl.fcntl(r, 15, struct.pack('ii', 1, pid)); arm()",
    "FIOSETOWN": "fcntl.ioctl(r, 0x8901, struct.pack('i', pid)); arm()",
}


def test_no_signal_of_a_parent_reaches_its_forks(parent, fork):
    """A parent sees the numbers of its forks' processes, and none of the calls that send signals ends one."""
    parent.run("kept = 1")
    child, other = fork(parent, 2)
    child.run("import subprocess; sleeper = subprocess.Popen(['sleep', '1000'])")
    assert "signal_filter" in parent.machine.walls
    for name, attack in ATTACKS.items():
        told = parent.run(f"""
import ctypes, fcntl, os, signal, socket, struct
libc = ctypes.CDLL(None)
r, w = (sock.detach() for sock in socket.socketpair())
def arm():
    fcntl.fcntl(r, fcntl.F_SETSIG, 9); fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC); os.write(w, b'x')
others = [int(name) for name in os.listdir('/proc') if name.isdigit() and int(name) not in (1, os.getpid())]
for pid in others:
    try: {attack}
    except OSError: pass
print(len(others))
""")
        assert int(told.stdout) >= 5, "the parent saw no process of its forks"
        assert child.run("print(kept, sleeper.poll())").stdout == "1 None\n", name
        assert other.run("print(kept)").stdout == "1\n", name
    parent.run("pkill -9 sleep; kill -9 -1", "bash")
    parent.run("import os; os.kill(-1, 9)")
    assert child.run("print(kept, sleeper.poll())").stdout == "1 None\n"


def test_signals_within_a_machine_with_forks_work(parent, fork):
    """With forks alive, signals to own processes, groups and threads do what they always do."""
    fork(parent, 2)
    told = parent.run("""
import os, signal, subprocess, threading, time
seen = []
signal.signal(signal.SIGUSR1, lambda *args: seen.append(args[0]))
os.kill(os.getpid(), signal.SIGUSR1); signal.raise_signal(signal.SIGUSR1)
signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
signal.pidfd_send_signal(os.pidfd_open(os.getpid()), signal.SIGUSR1)
def sleeper(**options): return subprocess.Popen(['sleep', '1000'], **options)
one, two, group, last = sleeper(), sleeper(), sleeper(start_new_session=True), [sleeper() for _ in range(3)]
one.kill(); os.kill(two.pid, signal.SIGTERM); os.killpg(group.pid, signal.SIGINT)
print(seen, one.wait(), two.wait(), group.wait())
os.kill(-1, signal.SIGTERM)
print([process.wait() for process in last])
try: os.kill(4_000_000, 0)
except OSError as exc: print(exc.strerror)
try: os.kill(os.getpid(), 99)
except OSError as exc: print(exc.strerror)
""")
    assert told.stdout.splitlines() == [
        "[10, 10, 10, 10] -9 -15 -2",
        "[-15, -15, -15]",
        "No such process",
        "Invalid argument",
    ], told


def test_a_child_does_not_see_the_other_branches(parent, fork):
    """A child's process list holds its own processes only, and it cannot open another branch's memory."""
    one, two = fork(parent, 2)
    for machine in (one, two):
        out = machine.run("import os; print(sorted(int(p) for p in os.listdir('/proc') if p.isdigit()))")
        assert out.stdout == "[1, 2]\n"


def test_a_dead_child_is_nobodys_business(parent, fork):
    """A child that dies, floods or is closed changes nothing for parent and siblings."""
    parent.run("kept = 1")
    one, two = fork(parent, 2)
    one.run("import os; os._exit(1)")
    one.close()
    assert two.run("print(kept)").stdout == "1\n"
    assert parent.run("print(kept)").stdout == "1\n"


def test_children_outlive_their_parent(parent, fork):
    """Closing the parent ends its processes at once, and none of its forks or theirs."""
    parent.run("import subprocess; proc = subprocess.Popen(['sleep', '1000']); kept = 1")
    (child,) = fork(parent)
    (grandchild,) = fork(child)
    group = parent.machine.parts.cgroup
    parent.close()
    child.close()
    if group is not None:
        assert all(
            (path / "cgroup.procs").read_text().split() == [str(parent.machine.agent_pid)] for path in group.directories
        )
    assert grandchild.run("print(kept)").stdout == "1\n"


def test_interrupting_the_parents_cell_leaves_its_forks_alone(parent, fork):
    """The end of every process that a cell started does not reach machines that were forked meanwhile."""
    from podflare.wire.messages import Interrupt

    (child,) = fork(parent)
    child.run("import subprocess; proc = subprocess.Popen(['sleep', '1000'])")
    parent.start("import time; time.sleep(1000)")
    parent.send(Interrupt())
    parent.finish()
    assert child.run("print(proc.poll())").stdout == "None\n"


def test_waiting_for_children_in_the_parent_is_not_disturbed(parent, fork):
    """os.wait in the parent never sees a fork's process."""
    fork(parent, 2)
    out = parent.run("import os\ntry: print(os.waitpid(-1, os.WNOHANG))\nexcept ChildProcessError: print('none')")
    assert out.stdout == "none\n"


def test_a_replaced_fork_function_does_not_cheat(parent, fork):
    """User code that replaces os.fork changes nothing in how the REPL forks."""
    parent.run("import os, posix; os.fork = posix.fork = lambda: 0; x = 1")
    (child,) = fork(parent)
    assert child.run("print(x)").stdout == "1\n"


@pytest.mark.parametrize("sabotage", [
    "import os\nfor fd in range(3, 4096):\n    try: os.close(fd)\n    except OSError: pass",
    "import ctypes, os\nlibc = ctypes.CDLL(None)\nos.register_at_fork(after_in_child=lambda: os._exit(0))",
    "import os, time\nos.register_at_fork(after_in_child=lambda: time.sleep(1000))",
    "import sys\nf = sys._getframe()\nwhile f.f_globals.get('__name__') != 'podflare.guest.repl': f = f.f_back\nf.f_globals['fork_children'] = lambda *a: None",
])  # fmt: skip
def test_a_repl_that_sabotages_its_fork_gets_an_error(parent, sabotage):
    """Whatever a REPL does instead of forking, the call fails in time, no child exists, and the parent answers."""
    parent.run(sabotage)
    before = set(os.listdir(parent.machine.directory.parent))
    try:
        children = parent.fork(timeout_s=2)
    except (MachineFailed, IsolationIncomplete, TimeoutError):
        children = []
    for child in children:
        child.close()
    assert set(os.listdir(parent.machine.directory.parent)) == before
    parent.run("pass")
    assert parent.run("print(2)").stdout == "2\n"


def test_a_process_of_the_parent_cannot_pose_as_the_child(parent):
    """A hello from a process that is not in the new machine is refused, and the machine is closed."""
    parent.run("""
import json, os, sys
frame = sys._getframe()
while frame.f_globals.get("__name__") != "podflare.guest.repl": frame = frame.f_back
def pose(*args):
    for child in args[0]: os.write(child.line, json.dumps({"born": {}}).encode())
frame.f_globals["fork_children"] = pose
""")
    with pytest.raises(IsolationIncomplete, match="not what was ordered"):
        parent.fork(timeout_s=10)
    assert parent.run("print(2)").stdout == "2\n"


def test_a_full_process_limit_fails_the_fork_and_harms_nobody(new_machine):
    """Where the machines' limits leave no room the fork fails as a whole, and the parent is as before."""
    from podflare.engines.base import Limits

    machine = new_machine(Limits(memory_bytes=256 * 2**20, disk_bytes=2**30, max_processes=40))
    machine.run(
        "import subprocess\nprocs = []\ntry:\n    while True: procs.append(subprocess.Popen(['sleep', '1000']))\nexcept OSError: pass"
    )
    try:
        for child in machine.fork(2, timeout_s=20):
            child.close()
    except (MachineFailed, IsolationIncomplete, TimeoutError):
        pass
    assert machine.run("print(len(procs) > 10)").stdout == "True\n"


def test_nothing_of_a_fork_is_left_after_close(parent, engine):
    """Directories, layers and control groups of forks go with the last machine that uses them."""
    parent.run("open('/root/f', 'w').write('x' * 100000)")
    folder = Path(engine._data, "machines")
    before = set(os.listdir(folder))
    children = parent.fork(3)
    grandchildren = children[0].fork(2)
    for machine in (*children, *grandchildren):
        machine.close()
    assert set(os.listdir(folder)) == before


def test_a_cancelled_fork_leaves_nothing_and_the_next_one_works(parent, fork, portal):
    """Wherever a fork is cancelled, no child, descriptor or directory stays, and the parent can be forked again."""
    import anyio

    parent.run("kept = 1")
    folder = parent.machine.directory.parent

    async def cancelled(after_s: float) -> None:
        with anyio.move_on_after(after_s):
            children = await parent.machine.fork(2, reseed=True, timeout_s=20)
            with anyio.CancelScope(shield=True):
                for child in children:
                    await child.aclose()

    before = set(os.listdir(folder))
    for step in range(25):
        portal.call(cancelled, step * 0.0015)
        assert set(os.listdir(folder)) == before
    (child,) = fork(parent)
    assert child.run("print(kept)").stdout == "1\n"
