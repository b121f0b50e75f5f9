"""A machine that ends while the process that made its fork is still there, as it may be on a busy computer."""

from __future__ import annotations

import subprocess
import sys

SCENE = """
import os, signal, sys
from podflare.guest import processes, syscalls as sc

ask_r, ask_w = os.pipe()
tell_r, tell_w = os.pipe()
sc.unshare(sc.CLONE_NEWPID)
agent = os.fork()
if agent == 0:
    sc.unshare(sc.CLONE_NEWNS)
    sc.mount("proc", "/proc", "proc", 0)
    census = processes.Census()
    own = os.fork()
    if own == 0:
        signal.pause()
    os.write(tell_w, b".")
    os.read(ask_r, 1)
    listed = [process.pid for process in census.descendants()]
    assert own in listed and len(listed) == 2, listed  # and the maker
    census.end_all()
    os.write(tell_w, b"e")
    census.wait_for_nested()
    os._exit(7)
os.read(tell_r, 1)

space = os.open(f"/proc/{agent}/ns/pid", os.O_RDONLY)
sc.setns(space, sc.CLONE_NEWPID)
maker = os.fork()
if maker == 0:
    sc.unshare(sc.CLONE_NEWPID)
    if os.fork() == 0:
        os.write(tell_w, b".")
        signal.pause()
    signal.pause()  # as if it had no turn on the processor to end
os.read(tell_r, 1)
os.close(tell_w)

(fork,) = open(f"/proc/{maker}/task/{maker}/children").read().split()
fork = os.pidfd_open(int(fork))
os.write(ask_w, b".")
assert os.read(tell_r, 1) == b"e"
os.waitpid(maker, 0)
signal.pidfd_send_signal(fork, signal.SIGKILL)
print(os.WEXITSTATUS(os.waitpid(agent, 0)[1]))
"""


def test_a_fork_whose_maker_is_slow_outlives_its_parent() -> None:
    """The parent's first process ends its own processes, not the fork, and waits for it."""
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command += [sys.executable, "-c", SCENE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "7\n", done.stderr
