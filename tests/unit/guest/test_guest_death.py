"""Promise: a REPL that dies or goes wild is told plainly and started anew; the machine goes on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from itertools import pairwise

import pytest
from guest_driver import is_alive, resident_kib, wait_until

from podflare.wire.messages import DIED, ENDED

CONTROL = """
import os, stat
control = next(fd for fd in range(3, 5000) if os.path.exists(f"/proc/self/fd/{fd}")
               and stat.S_ISSOCK(os.fstat(fd).st_mode))
"""


@pytest.mark.parametrize(
    ("code", "exit_code", "signal_number", "words"),
    [
        ("import os; os._exit(0)", 0, 0, "exited with status 0"),
        ("import os; os._exit(7)", 7, 0, "exited with status 7"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137, signal.SIGKILL, "SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", 139, signal.SIGSEGV, "SIGSEGV"),
        ("import os; os.abort()", 134, signal.SIGABRT, "SIGABRT"),
        (
            "import threading, os; threading.Thread(target=os._exit, args=(3,)).start()\nwhile True: pass",
            3,
            0,
            "status 3",
        ),
        ("import os; os.execvp('sleep', ['sleep', '60'])", 137, signal.SIGKILL, "SIGKILL"),
    ],
)
def test_death_of_the_repl(guest, code, exit_code, signal_number, words):
    """A cell that ends its own process gets its output, a line that says what happened, and DIED."""
    guest.run("kept = 1")
    cell = guest.run("print('before')\n" + code)
    assert cell.out == "before\n"
    assert words in cell.stderr
    assert "all variables are lost" in cell.stderr
    assert cell.exit.code == exit_code
    assert (cell.exit.reason, cell.exit.restarted, cell.exit.signal) == (DIED, True, signal_number)
    after = guest.run("print('kept' in globals())")
    assert (after.out, after.exit.restarted, after.exit.reason) == ("False\n", False, ENDED)


def test_death_between_cells_is_told_in_the_next(guest):
    """When the REPL dies while no cell runs, the next cell's stderr and exit say so."""
    pid = int(guest.run("import os, threading; go = threading.Event(); print(os.getpid())").out)
    guest.run("threading.Thread(target=lambda: (go.wait(), os._exit(5))).start()")
    guest.run("threading.Timer(0.05, go.set).start()")
    wait_until(lambda: not is_alive(pid), "the REPL to end")
    cell = guest.run("print('go' in globals())")
    assert cell.out == "False\n"
    assert "exited with status 5" in cell.stderr
    assert cell.exit.restarted
    assert not guest.run("1").exit.restarted


def test_death_during_a_bash_cell(guest):
    """A REPL that dies while a bash cell runs is told by that cell, which is not harmed."""
    pid = guest.run("import os; print(os.getpid())").out.strip()
    cell = guest.bash(f"kill -9 {pid}; while kill -0 {pid} 2>/dev/null; do :; done; sleep 0.05; echo done; exit 3")
    assert (cell.out, cell.exit.code, cell.exit.reason, cell.exit.restarted) == ("done\n", 3, ENDED, True)
    assert "SIGKILL" in cell.stderr


def test_deaths_in_a_row(guest):
    """Twenty deaths in a row cost nothing but variables."""
    for _ in range(20):
        assert guest.run("import os; os._exit(1)").exit.restarted
    assert guest.run("print('fine')").out == "fine\n"


def test_processes_of_a_dead_repl_are_reaped(guest):
    """Children of a REPL that died are adopted by the agent, and no zombie is left when they end."""
    pids = [
        int(word)
        for word in guest.run("""
import os, subprocess
print(*(subprocess.Popen(["sleep", "0.2"]).pid for _ in range(5)), flush=True)
os._exit(0)
""").out.split()
    ]
    wait_until(lambda: not any(_exists(pid) for pid in pids), "zombies to be reaped")


def test_zombies_do_not_accumulate(guest):
    """A thousand orphans leave no zombie under the agent."""
    guest.run("""
import os
for _ in range(1000):
    pid = os.fork()
    if pid == 0:
        if os.fork() == 0: os._exit(0)
        os._exit(0)
    os.waitpid(pid, 0)
""")
    wait_until(lambda: _zombies_below(guest.process.pid) == 0, "zombies to be reaped")


@pytest.mark.parametrize(
    "attack",
    [
        "os.write(control, b'garbage' * 100)",
        "os.write(control, struct.pack('>IBI', 2**32 - 1, 1, 1))",
        "os.write(control, struct.pack('>IBI', 2, 1, 1) + b'{}')",
        "os.write(control, struct.pack('>IBI', 2, 4, 1) + b'xx')",
        """body = b'{"op":"file_done","size":1}'; os.write(control, struct.pack('>IBI', len(body), 1, 1) + body)""",
        """body = b'{"op":"exit","code":0}'; os.write(control, struct.pack('>IBI', len(body), 1, 99) + body)""",
        """body = b'[' * 100000; os.write(control, struct.pack('>IBI', len(body), 1, 1) + body)""",
        "os.close(control)",
        "os.set_blocking(control, False)",
        "import socket; socket.socket(fileno=os.dup(control)).shutdown(2)",
        "os.dup2(os.open('/dev/null', os.O_RDWR), control)",
    ],
)
def test_abuse_of_the_control_socket(guest, attack):
    """Whatever user code does to the REPL's own channel ends at most the REPL, and later cells run."""
    guest.start(f"{CONTROL}\nimport struct, time\n{attack}\ntime.sleep(0.1)")
    cell = guest.finish(1)
    assert cell.exit.reason in (DIED, ENDED)
    # One that was deafened notices when it waits for a cell: sooner or later, and once.
    ran = [guest.run("print('next')").out == "next\n" for _ in range(4)]
    assert all(one or after for one, after in pairwise(ran)), ran


def test_forged_end_of_a_cell(guest):
    """Code that forges its own exit gets its cell ended early; its real end does not pass for the next cell's."""
    channel = guest.start(f"""{CONTROL}
import struct, time
body = b'{{"op":"exit","code":0,"reason":"ended"}}'
os.write(control, struct.pack(">IBI", len(body), 1, 1) + body)
time.sleep(0.2)
print("late")
""")
    assert guest.finish(channel).exit.code == 0
    cell = guest.run("print('second')")
    assert cell.exit.reason == DIED
    assert "broke the protocol" in cell.stderr
    assert guest.run("print('third')").out == "third\n"


def test_forged_exit_cannot_claim_a_restart(guest):
    """What the REPL says of restarts and signals is not believed."""
    cell = guest.run(f"""{CONTROL}
import struct
body = b'{{"op":"exit","code":5,"reason":"died","restarted":true,"signal":9}}'
os.write(control, struct.pack(">IBI", len(body), 1, 1) + body)
""")
    assert (cell.exit.code, cell.exit.reason, cell.exit.restarted, cell.exit.signal) == (5, ENDED, False, 0)


def test_flood_of_results_stays_bounded(guest):
    """Results without end do not grow the agent: a host that does not read holds the REPL back."""
    channel = guest.start("while True: display('x' * 500_000)")
    first = guest.next_frame(channel)
    assert first.payload
    import time

    time.sleep(0.5)  # a bound must hold while time passes; there is nothing to wait for
    assert resident_kib(guest.process.pid) < 80 * 1024
    guest.kill(channel)
    assert guest.finish(channel).exit.reason == DIED


def test_end_of_the_channel_ends_everything(guest):
    """When the host is gone the agent ends the REPL, running cells and everything left in the background."""
    pids = [int(guest.run("import os; print(os.getpid())").out)]
    pids.append(int(guest.run("import subprocess; print(subprocess.Popen(['setsid', 'sleep', '62']).pid)").out))
    pids.append(int(guest.bash("sleep 62 >/dev/null & echo $!").out))
    guest.start("while True: pass")
    guest.close()
    assert guest.process.returncode == 0
    wait_until(lambda: not any(map(is_alive, pids)), "everything to end")


def test_agent_ignores_signals_of_user_code(guest):
    """SIGTERM, SIGINT and SIGHUP to the agent do nothing."""
    cell = guest.run("import os, signal\nfor n in (15, 2, 1, signal.SIGRTMIN + 5): os.kill(os.getppid(), n)")
    assert cell.exit.code == 0
    assert guest.run("print('alive')").out == "alive\n"


@pytest.fixture
def started_in_background() -> Iterator[None]:
    """This process ignores what one ignores that a script starts with `nohup ... &`."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (1, 2, 3)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_are_default_for_user_processes(started_in_background, guest):
    """What the agent, or whoever started it, ignores is not ignored by what user code starts."""
    check = "grep SigIgn /proc/self/status"
    # 32 and 33 belong to libc, which lets nobody change them: whoever starts a program by posix_spawn (make does)
    # leaves them ignored.
    libc = 0b11 << 31
    assert int(guest.bash(check).out.split()[1], 16) & ~libc == 0
    mask = int(guest.run(f"import subprocess; print(subprocess.getoutput('{check}'))").out.split()[1], 16)
    assert mask & ~libc == 0


def test_guest_that_cannot_be_confined_never_gets_ready(bundle, home, private_temp):
    """If the engine's last step of confinement fails in the REPL process, no Ready is sent and the agent ends."""
    import socket
    import subprocess
    import sys

    ours, theirs = socket.socketpair()
    program = f"""
import socket, sys
sys.path.insert(0, {str(bundle)!r})
from podflare.guest import agent
def fail(): raise OSError("a wall is missing")
agent.run(socket.socket(fileno={theirs.fileno()}), home={str(home)!r}, before_repl=fail)
"""
    with ours, theirs:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", program], pass_fds=[theirs.fileno()], capture_output=True, timeout=30
        )
        theirs.close()
        assert ours.recv(1) == b""
    assert done.returncode == 1
    assert b"before it was ready" in done.stderr


def _exists(pid: int) -> bool:
    import os

    return os.path.exists(f"/proc/{pid}")


def _zombies_below(parent: int) -> int:
    import os

    count = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            count += fields[0] == "Z" and int(fields[1]) == parent
    return count
