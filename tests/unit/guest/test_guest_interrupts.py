"""Promise: Interrupt and Kill end a cell and everything it started, and nothing that was there before."""

from __future__ import annotations

import pytest
from guest_driver import is_alive, resident_kib, wait_until

from podflare.wire.messages import DIED, ENDED, INTERRUPTED, Interrupt

DEAF = """
said = False
while True:
    try:
        if not said:
            said = True
            print("deaf", flush=True)
        while True: pass
    except BaseException: pass
"""


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import subprocess; subprocess.run(['sleep', '60'])",
        "import os; os.system('sleep 60')",
        "import os\nwhile True: os.system('sleep 60')",
        "import threading; threading.Event().wait()",
        "import socket; a, b = socket.socketpair(); a.recv(1)",
        "import subprocess; subprocess.run('sleep 60 & sleep 60 & wait', shell=True)",
    ],
)
def test_interrupt_ends_the_cell_and_keeps_the_state(guest, body):
    """An interrupt raises KeyboardInterrupt wherever the cell waits or computes; variables are kept."""
    guest.run("kept = 1")
    channel = guest.start("print('started', flush=True)\n" + body)
    guest.wait_output(channel, b"started")
    guest.interrupt(channel)
    cell = guest.finish(channel, timeout_s=20)
    assert (cell.exit.code, cell.exit.reason, cell.exit.restarted) == (130, INTERRUPTED, False), cell
    assert "KeyboardInterrupt" in cell.stderr
    assert guest.run("kept").value == "1"


def test_interrupt_in_a_finalizer_is_not_lost(guest):
    """An interrupt that Python drops, because it fell into a finalizer, comes again."""
    channel = guest.start("""
class Slow:
    def __del__(self):
        print("started", flush=True)
        while True: pass
x = Slow()
del x
import time
time.sleep(60)
""")
    guest.wait_output(channel, b"started")
    guest.interrupt(channel)
    cell = guest.finish(channel, timeout_s=20)
    assert cell.exit.reason == INTERRUPTED
    assert "ignored" not in cell.stderr


def test_interrupt_right_behind_its_cell(guest):
    """An interrupt that arrives before the REPL has read the cell still ends it."""
    guest.run("kept = 1")
    for _ in range(30):
        channel = guest.start("while True: pass")
        guest.interrupt(channel)
        assert guest.finish(channel, timeout_s=20).exit.reason == INTERRUPTED
    assert guest.run("kept").value == "1"


def test_late_interrupts_do_nothing(guest):
    """An interrupt for a cell that has ended meanwhile neither hits the next cell nor the waiting REPL."""
    guest.run("kept = 1")
    for _ in range(200):
        channel = guest.start("x = 1")
        guest.send(channel, Interrupt())
        assert guest.finish(channel).exit.reason in (ENDED, INTERRUPTED)
        guest.send(channel, Interrupt())
        assert guest.run("kept").value == "1"


def test_any_number_of_interrupts(guest):
    """Hundreds of interrupts of a cell that catches them all neither grow the agent nor delay the kill."""
    channel = guest.start(DEAF)
    guest.wait_output(channel, b"deaf")
    before = resident_kib(guest.process.pid)
    for _ in range(400):
        guest.interrupt(channel)
    guest.kill(channel)
    assert guest.finish(channel).exit.reason in (DIED, INTERRUPTED)
    assert resident_kib(guest.process.pid) - before < 2048
    assert guest.run("1").value == "1"


def test_caught_interrupt_goes_on(guest):
    """Code that catches KeyboardInterrupt runs on and ends as it likes."""
    channel = guest.start("""
import time
try:
    print("started", flush=True); time.sleep(60)
except KeyboardInterrupt:
    print("caught")
5
""")
    guest.wait_output(channel, b"started")
    guest.interrupt(channel)
    cell = guest.finish(channel)
    assert (cell.out, cell.value, cell.exit.code, cell.exit.reason) == ("caught\n", "5", 0, ENDED)


def test_handlers_of_user_code_do_not_block_interrupts(guest):
    """A cell that made SIGINT ignored, or every signal in an earlier cell, does not escape an interrupt."""
    guest.run("""
import signal
for number in signal.valid_signals() - {9, 19}: signal.signal(number, signal.SIG_IGN)
""")
    channel = guest.start(
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('started', flush=True)\nwhile True: pass"
    )
    guest.wait_output(channel, b"started")
    guest.interrupt(channel)
    assert guest.finish(channel, timeout_s=20).exit.reason == INTERRUPTED


def test_interrupt_ends_everything_the_cell_started(guest):
    """After an interrupt no process of the cell is left: not children, grandchildren, orphans or new sessions."""
    channel = guest.start("""
import os, subprocess, time
pids = []
def note(p): pids.append(p.pid); return p
note(subprocess.Popen(["sleep", "61"]))
note(subprocess.Popen(["sleep", "61"], start_new_session=True))
r, w = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        os.setsid(); os.write(w, str(os.getpid()).encode()); time.sleep(61)
    os._exit(0)
pids.append(int(os.read(r, 20)))
print("pids", *pids, "end", flush=True)
time.sleep(60)
""")
    seen = b""
    while b"end" not in seen:
        seen += guest.next_frame(channel).payload
    pids = [int(word) for word in seen.split()[1:-1]]
    assert len(pids) == 3
    assert all(map(is_alive, pids))
    guest.interrupt(channel)
    assert guest.finish(channel).exit.reason == INTERRUPTED
    assert not any(map(is_alive, pids))


def test_processes_of_earlier_cells_survive(guest):
    """An interrupt or kill of one cell leaves alone what earlier cells started, even if they ended just before."""
    for end in (guest.interrupt, guest.kill):
        pid = int(guest.run("import subprocess; p = subprocess.Popen(['sleep', '61']); print(p.pid)").out)
        shell = int(guest.bash("sleep 61 >/dev/null & echo $!").out)
        channel = guest.start("print('started', flush=True)\nwhile True: pass")
        guest.wait_output(channel, b"started")
        end(channel)
        guest.finish(channel)
        assert is_alive(pid)
        assert is_alive(shell)


def test_cell_that_keeps_starting_processes(guest):
    """A cell that swallows interrupts and starts new children has none left after it was killed."""
    channel = guest.start("""
import subprocess
said = False
while True:
    try:
        while True:
            if not said:
                said = True
                print("started", flush=True)
            try: subprocess.run(["sleep", "61.5"])
            except BaseException: pass
    except BaseException: pass
""")
    guest.wait_output(channel, b"started")
    guest.interrupt(channel)
    guest.kill(channel)
    cell = guest.finish(channel)
    assert (cell.exit.code, cell.exit.reason, cell.exit.restarted) == (137, DIED, True)
    assert guest.run("import subprocess; print(subprocess.run(['pgrep', '-fx', 'sleep 61.5']).returncode)").out == "1\n"


def test_kill_restarts_the_repl(guest):
    """Kill ends a cell that cannot be interrupted; the answer says that variables are gone, and the next cell runs."""
    guest.run("kept = 1")
    channel = guest.start(DEAF)
    guest.wait_output(channel, b"deaf")
    guest.kill(channel)
    cell = guest.finish(channel)
    assert (cell.exit.code, cell.exit.reason, cell.exit.restarted, cell.exit.signal) == (137, DIED, True, 9)
    assert "variables are lost" in cell.stderr
    assert guest.run("kept").error is not None
    assert guest.run("print('new')").out == "new\n"


def test_interrupt_of_a_deaf_cell_then_kill(guest):
    """The host's way with a cell that cannot be interrupted, Interrupt and then Kill, ends it."""
    channel = guest.start(DEAF)
    guest.wait_output(channel, b"deaf")
    guest.interrupt(channel)
    guest.kill(channel)
    assert guest.finish(channel, timeout_s=20).exit.restarted


def test_interrupt_gets_through_while_output_is_blocked(guest):
    """A cell that floods a host which does not read can be killed: only its last output waits to be read."""
    channel = guest.start("import sys\nwhile True: sys.stdout.write('x' * 65536)")
    wait_until(lambda: _blocked(guest), "the channel to fill")
    guest.kill(channel)
    cell = guest.finish(channel)
    assert cell.exit.reason == DIED
    assert len(cell.stdout) < 8 * 1024 * 1024


def test_interrupted_flood_ends_by_itself(guest):
    """An interrupt ends a cell whose write to stdout is blocked."""
    channel = guest.start("import sys\nwhile True: sys.stdout.write('x' * 65536)")
    wait_until(lambda: _blocked(guest), "the channel to fill")
    guest.interrupt(channel)
    cell = guest.finish(channel)
    assert cell.exit.reason == INTERRUPTED
    assert not cell.exit.restarted


def _blocked(guest) -> bool:
    """Whether the REPL waits in a write to a full pipe."""
    import os

    for pid in _children(guest.process.pid):
        try:
            with open(f"/proc/{pid}/wchan") as file:
                if "pipe" in file.read():
                    return True
            with open(f"/proc/{pid}/syscall") as file:
                if file.read().split()[0] == str(1) and os.path.exists(f"/proc/{pid}"):
                    return True
        except OSError:
            continue
    return False


def _children(pid: int) -> list[int]:
    import os

    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    if int(file.read().rpartition(")")[2].split()[1]) == pid:
                        found.append(int(name))
            except OSError:
                continue
    return found


def test_interrupt_within_display(guest):
    """Interrupts at any moment of a cell that sends results never cut a message in two."""
    for _ in range(20):
        channel = guest.start("print('s', flush=True)\nwhile True: display('x' * 10000)")
        guest.wait_output(channel, b"s")
        guest.interrupt(channel)
        cell = guest.finish(channel)
        assert cell.exit.reason == INTERRUPTED
        assert not cell.exit.restarted


def test_slow_repr_can_be_interrupted(guest):
    """The repr of a value and the text of an exception are user code and can be interrupted."""
    for code in (
        "class S:\n    def __repr__(self):\n        print('in')\n        while True: pass\nS()",
        "class E(Exception):\n    def __str__(self):\n        print('in')\n        while True: pass\nraise E",
    ):
        channel = guest.start(code)
        guest.wait_output(channel, b"in")
        guest.interrupt(channel)
        cell = guest.finish(channel, timeout_s=20)
        assert cell.exit.reason == INTERRUPTED
        assert not cell.exit.restarted
