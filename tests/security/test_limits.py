"""Promise: what a sandbox may use has limits, passing one has a clear end, and nobody else notices.

Memory, processes, single files and the sum of their bytes: test_abuse.py.
"""

from __future__ import annotations

import ctypes
import os
import pty

import anyio
import pytest

from machines import DrivenMachine
from podflare.engines.base import Limits

SMALL = Limits(memory_bytes=192 * 2**20, disk_bytes=96 * 2**20, max_processes=64)
PRELUDE = """
import array, ctypes, os, resource, signal, socket
libc = ctypes.CDLL(None, use_errno=True)
held = []
def until_refused(take, most):
    for count in range(most):
        try:
            if (got := take()) is not None: held.append(got)
        except OSError as error:
            return count, error.errno
    return most, 0
def called(name, *arguments):
    got = getattr(libc, name)(*arguments)
    if got < 0: raise OSError(ctypes.get_errno(), name)
    return got
class Value(ctypes.Union): _fields_ = [("number", ctypes.c_int), ("pointer", ctypes.c_void_p)]
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN])
def queue_signal(): called("sigqueue", os.getpid(), signal.SIGRTMIN, Value(number=1))
def open_queue(): return called("mq_open", f"/q{len(held)}".encode(), os.O_CREAT | os.O_RDWR, 0o600, None)
def watch(): return called("inotify_init1", 0)
def terminal(): return os.openpty()
"""
SENDING = """
def send_descriptors():
    ends = socket.socketpair()
    ends[0].sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 250))])
    return ends
"""


def test_files_without_end_end_the_machine(new_machine):
    """Empty files take no disk but inodes: making them without end ends that machine alone, which says why."""
    machine, neighbour = new_machine(SMALL), new_machine(SMALL)
    machine.start("import os, itertools\nfor n in itertools.count(): os.close(os.open(f'/root/{n}', os.O_CREAT))")

    async def death():
        with anyio.fail_after(30):
            return await machine.machine.wait_dead()

    found = machine.call(death)
    assert found.out_of_disk
    assert "6,144 files" in found.reason and "rootfs_gb" in found.reason
    assert neighbour.run("open('/root/f', 'w').close(); print(1)").stdout == "1\n"


@pytest.mark.parametrize(
    ("take", "most"),
    [("terminal", 64), ("watch", 16), ("queue_signal", 2048), ("open_queue", 8)],
)
def test_what_the_kernel_has_once_for_all_is_shared_out(new_machine, take, most):
    """Terminals, inotify instances, queued signals and message queues: one sandbox can take its share, and no more."""
    greedy, neighbour = new_machine(), new_machine()
    for machine in (greedy, neighbour):
        out = machine.run(PRELUDE + f"count, errno = until_refused({take}, 100_000)\nprint(count, errno)")
        count, errno = (int(word) for word in out.stdout.split())
        assert 0 < count <= most and errno in (11, 24, 28), out
    for fd in pty.openpty():
        os.close(fd)
    watching = ctypes.CDLL(None, use_errno=True).inotify_init1(os.O_CLOEXEC)
    assert watching >= 0
    os.close(watching)


@pytest.mark.any_engine
def test_open_files_are_limited(attacker):
    """A process that opens files without end gets EMFILE from Python and from a shell; others of its sandbox do not."""
    out = attacker.run("held = []\nwhile True: held.append(open('/dev/null'))")
    assert out.error is not None
    assert out.error.name == "OSError" and "Too many open files" in out.error.value
    assert attacker.run("ulimit -n; cat /dev/null && echo fine", "bash").stdout == "4096\nfine\n"
    assert attacker.run("count = len(held); del held[:]; print(3000 < count < 4096)").stdout == "True\n"


def test_descriptors_under_way_do_not_keep_others_from_forking(new_machine):
    """Who leaves descriptors in sockets by the thousand is refused more, while other sandboxes' agents pass on theirs."""
    greedy, neighbour = new_machine(), new_machine()
    out = greedy.run(PRELUDE + SENDING + "print(*until_refused(send_descriptors, 200))")
    sent, errno = (int(word) for word in out.stdout.split())
    assert 4096 <= (sent + 1) * 250 < 6000 and errno == 109, out
    (child,) = neighbour.fork()
    try:
        assert child.run("print(1)").stdout == "1\n"
    finally:
        child.close()


@pytest.mark.any_engine
def test_memory_of_a_shell_is_limited_as_the_repls(new_machine):
    """A program that a bash cell runs cannot allocate more than the sandbox may use, with control groups or without."""
    machine = new_machine(SMALL)
    allocate = "python3 -c 'held = [bytearray(1 << 20) for _ in range(1000)]' || echo refused"
    out = machine.run(allocate, "bash")
    assert "refused" in out.stdout or out.exit.code != 0
    assert machine.run("print(1)").stdout == "1\n"


def test_sandboxes_go_before_the_daemon_when_memory_runs_out(attacker):
    """Agent, REPL and shells have a higher oom score than this process, and cannot lower it below the daemon's."""
    out = attacker.run("""
import os
print(open('/proc/self/oom_score_adj').read())
try: os.write(os.open('/proc/self/oom_score_adj', os.O_WRONLY), b'-1')
except OSError as error: print(error.errno)
""")
    assert out.stdout.split() == ["500", "13"]
    assert int(attacker.run("cat /proc/self/oom_score_adj", "bash").stdout) == 500
    with open(f"/proc/{attacker.machine.agent_pid}/oom_score_adj") as agents, open("/proc/self/oom_score_adj") as ours:
        assert int(agents.read()) == max(200, int(ours.read()))


def test_processors_are_shared_by_sandboxes_not_by_processes(new_machine):
    """One process in one sandbox gets about what eight in another one get together, on a machine that is all theirs."""
    many, one = new_machine(), new_machine()
    if "cpu_limit" not in one.machine.walls:
        pytest.skip("this user has no control group for processors: processes compete one by one")
    burn = "import os, time\nends = time.monotonic() + 1.5\nchildren = [{}]\n{}\nwhile time.monotonic() < ends: pass\n"
    tell = "t = os.times(); print(t.user + t.system + t.children_user + t.children_system)"
    fork = "children = []\nfor _ in range(7):\n    pid = os.fork()\n    if not pid:\n        while time.monotonic() < ends: pass\n        os._exit(0)\n    children.append(pid)"
    wait = "for pid in children: os.waitpid(pid, 0)\n"
    many.start(burn.format("", fork) + wait + tell)
    alone = _seconds(one, burn.format("", "") + tell)
    together = float(many.finish().stdout)
    assert alone > together / 4, (alone, together)


def _seconds(machine: DrivenMachine, code: str) -> float:
    return float(machine.run(code).stdout)
