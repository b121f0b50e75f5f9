"""Promise: code in a sandbox neither sees, signals nor traces a process outside of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from attacking import BROKE, FAULTY, HELD, TOOLS, attempt_without_walls

from podflare.wire.messages import Interrupt, Kill


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the host that the same user runs, listening to signals for its life."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.both_engines
def test_only_own_processes_are_visible(attacker):
    """/proc lists the sandbox's processes only, first among them its agent as pid 1."""
    out = attacker.run("import os; print(sorted(int(p) for p in os.listdir('/proc') if p.isdigit()), os.getppid())")
    pids, parent = out.stdout.rsplit(" ", 1)
    assert parent.strip() == "1"
    assert len(pids.split(",")) <= 4, out.stdout


# PIDS are numbers of processes of the host; in the sandbox they mean nothing, which is what is tried.
REACH = {
    "kill": "for pid in PIDS: os.kill(pid, 9); broke(pid)",
    "kill of the group": "for pid in PIDS: os.killpg(pid, 9); broke(pid)",
    "tkill": "for pid in PIDS: call(200 if X86 else 130, pid, 9); broke(pid)",
    "tgkill": "for pid in PIDS: call(234 if X86 else 131, pid, pid, 9); broke(pid)",
    "sigqueue": "for pid in PIDS: call(129 if X86 else 138, pid, 9, ctypes.create_string_buffer(struct.pack('iii116x', 9, 0, -1))); broke(pid)",
    "pidfd_open": "for pid in PIDS: broke(os.pidfd_open(pid))",
    "every pidfd": """
for pid in range(3, 70000):
    if pid not in OWN:
        try: fd = os.pidfd_open(pid)
        except OSError: continue
        broke(pid)
""",
    "a timer's signal": """
for pid in PIDS:
    event = ctypes.create_string_buffer(struct.pack('QiiI44x', 0, 9, 4, pid))
    checked(libc.timer_create(0, event, ctypes.byref(ctypes.c_void_p()))); broke(pid)""",
    "a priority": "for pid in PIDS: os.setpriority(os.PRIO_PROCESS, pid, 19); broke(pid)",
    "a scheduler": "for pid in PIDS: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)); broke(pid)",
    "an affinity": "for pid in PIDS: os.sched_setaffinity(pid, {0}); broke(pid)",
    "an input/output class": "for pid in PIDS: call(251 if X86 else 30, 1, pid, 3 << 13); broke(pid)",
    "a limit": "import resource\nfor pid in PIDS: resource.prlimit(pid, resource.RLIMIT_NOFILE); broke(pid)",
    "a session": "for pid in PIDS: broke(os.getsid(pid))",
    "a robust list": "for pid in PIDS: call(274 if X86 else 100, pid, ctypes.byref(ctypes.c_void_p()), ctypes.byref(ctypes.c_size_t())); broke(pid)",
    "a clock": "for pid in PIDS: broke(time.clock_gettime((~pid << 3) | 2))",
    "/proc": "for pid in PIDS: broke(open(f'/proc/{pid}/cmdline').read())",
    "ptrace": "for pid in [*PIDS, 1]: call(101 if X86 else 117, 16, pid, 0, 0); broke(pid)",
    "ptrace seize": "for pid in [*PIDS, 1]: call(101 if X86 else 117, 0x4206, pid, 0, 0); broke(pid)",
    "ptrace of itself": "call(101 if X86 else 117, 0); broke('traced')",
    "process_vm_readv": """
space = ctypes.create_string_buffer(8)
vector = ctypes.create_string_buffer(struct.pack('QQ', ctypes.addressof(space), 8))
for pid in [*PIDS, 1, os.getppid()]: call(310 if X86 else 270, pid, vector, 1, vector, 1, 0); broke(pid)""",
    "process_vm_writev": """
vector = ctypes.create_string_buffer(struct.pack('QQ', id(1), 0))
for pid in [*PIDS, 1, os.getppid()]: call(311 if X86 else 271, pid, vector, 1, vector, 1, 0); broke(pid)""",
    "kcmp": "call(312 if X86 else 272, os.getpid(), 1, 0, 0, 0); broke('kcmp')",
    "pidfd_getfd": "call(438, os.pidfd_open(1), 0, 0); broke('getfd')",
    "pidfd_getfd of its parent": "call(438, os.pidfd_open(os.getppid()), 0, 0); broke('getfd')",
    "process_madvise": "call(440, os.pidfd_open(1), 0, 0, 4, 0); broke('madvise')",
    "process_mrelease": "call(448, os.pidfd_open(1), 0); broke('mrelease')",
    "move_pages": "call(279 if X86 else 239, 1, 0, 0, 0, 0, 0); broke('move_pages')",
    "migrate_pages": "call(256 if X86 else 238, 1, 64, 0, 0); broke('migrate')",
    "performance counters of others": "call(298 if X86 else 241, ctypes.create_string_buffer(struct.pack('II', 1, 112) + bytes(104)), 1, -1, -1, 0); broke('perf')",
    "the owner of a descriptor": "a, b = socket.socketpair()\nfor pid in PIDS: fcntl.fcntl(a, fcntl.F_SETOWN, pid); broke(pid)",
    "the peer's pidfd of inherited sockets": """
for name in os.listdir("/proc/self/fd"):
    try: peer = socket.socket(fileno=os.dup(int(name)))
    except OSError: continue
    try: fd = struct.unpack("i", peer.getsockopt(1, 77, 4))[0]
    except OSError: continue
    for attack in (lambda: signal.pidfd_send_signal(fd, 0), lambda: call(308 if X86 else 268, fd, 0x20000), lambda: call(438, fd, 0, 0),
                   *(lambda n=n: fcntl.ioctl(fd, 0xFF00 + n) for n in range(1, 11))):
        try: attack()
        except OSError: continue
        if "NSpid:\\t0" in open(f"/proc/self/fdinfo/{fd}").read() or "Pid:\\t0" in open(f"/proc/self/fdinfo/{fd}").read(): broke(name)
""",
}  # fmt: skip


def test_nobody_outside_can_be_reached_by_number(attempt, bystander, attacker):
    """No call that takes a process's number, or a descriptor of one, finds a process of the host or the agent's memory."""
    # Numbers above those that the sandbox itself uses.
    pids = [pid for pid in (os.getpid(), os.getppid(), bystander.pid, attacker.host_pid) if pid > 1000]
    attempt(REACH, f"PIDS = {pids}\nOWN = {{int(name) for name in os.listdir('/proc') if name.isdigit()}}\n")
    assert bystander.poll() is None


ALL = {
    "kill -9 of everybody": "os.kill(-1, 9); time.sleep(1)",
    "stop everybody": "os.kill(-1, signal.SIGSTOP)",
    "kill -9 of the group 0": "os.killpg(0, 9)",
    "every number": "for pid in range(3, 40000):\n    if pid not in OWN:\n        try: os.kill(pid, 9); broke(pid)\n        except OSError: pass",
    "the priority of the user": "os.setpriority(os.PRIO_USER, 0, 19)",
    "the input/output class of the user": "call(251 if X86 else 30, 3, 0, 3 << 13)",
    "the priority of the group": "os.setpriority(os.PRIO_PGRP, 0, 19)",
}


@pytest.mark.both_engines
def test_nobody_outside_is_hit_by_what_hits_all(attacker, new_machine, record, bystander):
    """Signals and priorities for all processes, all of a user or a group reach none of the host or of another sandbox."""
    other = new_machine()
    other.run("kept = 42; import subprocess; sleeper = subprocess.Popen(['sleep', '1000'])")
    before = os.getpriority(os.PRIO_PROCESS, bystander.pid)
    for name, attack in ALL.items():
        attacker.start(TOOLS + "OWN = {int(name) for name in os.listdir('/proc') if name.isdigit()}\n" + attack)
        try:
            out = attacker.finish(0.5)
            found = {
                name: f"{FAULTY}: {out.error}"
                if out.error and out.error.name not in ("OSError", "PermissionError", "ProcessLookupError")
                else HELD
            }
        except TimeoutError:  # it hit its own interpreter
            attacker.send(Interrupt())
            attacker.send(Kill())
            attacker.finish()
            found = {name: HELD}
        status = Path(f"/proc/{bystander.pid}/stat").read_text().rpartition(")")[2].split()[0]
        well = bystander.poll() is None and status in "SR" and os.getpriority(os.PRIO_PROCESS, bystander.pid) == before
        well = well and other.run("print(kept, sleeper.poll())").stdout == "42 None\n"
        record(found if well else {name: f"{BROKE}: others were hit"})
    attacker.run("kill -9 -1", "bash")
    assert other.run("print(kept)").stdout == "42\n" and bystander.poll() is None


@pytest.mark.control
def test_these_attacks_succeed_where_nothing_stops_them(bystander):
    """Without walls the same calls find the same processes."""
    own = f"if not os.path.exists('/proc/{bystander.pid}'): sys.exit()\nPIDS = [{bystander.pid}]\n"
    # Only calls that do no harm; the PID namespace is the one wall that is left, and /proc still shows the host.
    tried = {
        "/proc": REACH["/proc"],
        "ptrace of itself": REACH["ptrace of itself"],
        "pidfd_getfd of its parent": REACH["pidfd_getfd of its parent"],
    }
    found = attempt_without_walls(tried, own)
    assert {name: result.split(":")[0] for name, result in found.items()} == dict.fromkeys(tried, "broke")
    bystander.send_signal(signal.SIGTERM)
    assert bystander.wait(10) == -signal.SIGTERM
