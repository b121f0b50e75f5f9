"""Promise: the guest behaves the same in every engine."""

from __future__ import annotations

import time

import pytest

from machines import DrivenMachine
from podflare.wire import frames
from podflare.wire.messages import (
    DIED,
    ENDED,
    INTERRUPTED,
    MISSING,
    NOT_A_FILE,
    Ack,
    DataEnd,
    FileDone,
    FileFailed,
    FileRead,
    FileWrite,
    Interrupt,
    Kill,
    from_guest,
    to_payload,
)


def test_state_persists(machine):
    """Variables of one cell are there in the next; values are results, not output."""
    machine.run("x = 41")
    cell = machine.run("print('out'); x + 1")
    assert cell.stdout == "out\n"
    assert cell.results[0].data["text/plain"] == "42"
    assert cell.exit.reason == ENDED


def test_home_is_the_working_directory_of_both_languages(machine):
    """Python and bash start in HOME and see the same files."""
    machine.run("open('file', 'w').write('from python')")
    cell = machine.run('[ "$PWD" = "$HOME" ] && cat file', "bash")
    assert cell.stdout == "from python", cell.stderr


def test_home_is_writable_and_python_is_on_the_path(machine):
    """A script that a cell wrote runs with the `python3` that the path leads to."""
    machine.run("open('s.py', 'w').write('print(6 * 7)')")
    assert machine.run("python3 s.py", "bash").stdout == "42\n"


def test_error_and_exit_codes(machine):
    """Exceptions, SystemExit and shell codes arrive as such."""
    failed = machine.run("1 / 0")
    assert failed.error is not None
    assert failed.error.name == "ZeroDivisionError"
    assert 'File "<cell 1>", line 1' in failed.stderr
    assert machine.run("raise SystemExit(5)").exit.code == 5
    assert machine.run("exit 6", "bash").exit.code == 6


def test_input_is_at_its_end(machine):
    """Nothing waits for standard input."""
    assert machine.run("input()").error.name == "EOFError"
    assert machine.run("cat", "bash").exit.code == 0


@pytest.mark.parametrize(("language", "code"), [
    ("python", "print('started', flush=True)\nwhile True: pass"),
    ("python", "import os\nprint('started', flush=True)\nwhile True: os.system('sleep 60')"),
    ("bash", "echo started; while true; do sleep 1; done"),
])  # fmt: skip
def test_interrupt(machine, language, code):
    """An interrupt ends a cell of either language soon and keeps the variables."""
    machine.run("kept = 1")
    machine.start(code, language)
    wait_for_output(machine)
    started = time.monotonic()
    machine.send(Interrupt())
    cell = machine.finish(10)
    assert (cell.exit.code, cell.exit.reason) == (130, INTERRUPTED)
    assert time.monotonic() - started < 5
    assert machine.run("kept").results[0].data["text/plain"] == "1"


def test_interrupt_ends_all_that_the_cell_started_and_nothing_older(machine):
    """Grandchildren in sessions of their own end with their cell; a process of an earlier cell lives on."""
    machine.run("import subprocess; old = subprocess.Popen(['sleep', '60'])")
    machine.start("""
import time
new = subprocess.Popen(["setsid", "-f", "sleep", "61.25"])
new.wait()
print("started", flush=True)
time.sleep(60)
""")
    wait_for_output(machine)
    machine.send(Interrupt())
    assert machine.finish(10).exit.reason == INTERRUPTED
    look = """
import os
def running(argument):
    found = 0
    for name in os.listdir("/proc"):
        try: found += name.isdigit() and argument in open(f"/proc/{name}/cmdline").read().split("\\0")
        except OSError: pass
    return found
print(running("61.25"), old.poll())
"""
    assert machine.run(look).stdout == "0 None\n"


def test_kill(machine):
    """Kill ends a cell that cannot be interrupted; the next one runs in a new REPL, and is told so."""
    machine.start("""
print("started", flush=True)
while True:
    try:
        while True: pass
    except BaseException: pass
""")
    wait_for_output(machine)
    machine.send(Kill())
    cell = machine.finish(10)
    assert (cell.exit.code, cell.exit.reason, cell.exit.restarted) == (137, DIED, True)
    assert machine.run("print('new')").stdout == "new\n"


def test_death_of_the_repl(machine):
    """A REPL that ends itself is told with its status and replaced."""
    cell = machine.run("import os; os._exit(7)")
    assert (cell.exit.code, cell.exit.reason, cell.exit.restarted) == (7, DIED, True)
    assert "variables are lost" in cell.stderr
    assert machine.run("print('next')").stdout == "next\n"


def test_large_output_is_complete(machine, part):
    """Megabytes of numbered lines arrive whole."""
    lines = 100_000 // part
    cell = machine.run(f"for i in range({lines}): print(f'{{i:06d}}', 'x' * 92)")
    assert [int(line[:6]) for line in cell.stdout.splitlines()] == list(range(lines))


def test_orphans_are_reaped(machine, part):
    """No zombie is left of many orphans."""
    machine.run(f"count = {500 // part}")
    machine.run("""
import os
for _ in range(count):
    pid = os.fork()
    if pid == 0:
        if os.fork() == 0: os._exit(0)
        os._exit(0)
    os.waitpid(pid, 0)
""")
    look = """
import os, time
def zombies():
    count = 0
    for name in os.listdir("/proc"):
        try: fields = open(f"/proc/{name}/stat").read().rpartition(")")[2].split()
        except OSError: continue
        count += fields[0] == "Z" and int(fields[1]) == os.getppid()
    return count
deadline = time.monotonic() + 10
while zombies() and time.monotonic() < deadline: pass
print(zombies())
"""
    assert machine.run(look).stdout == "0\n"


def test_files(machine):
    """Files go in and out whole, beside a running cell; failures have their reasons."""
    machine.start("print('started', flush=True)\nwhile True: pass")
    wait_for_output(machine)
    running, machine._channel = machine._channel, machine._channel + 1000
    data = bytes(range(256)) * 4096
    assert write(machine, "sub/file", data) == FileDone(len(data))
    assert read(machine, "~/sub/file") == data
    missing, folder = read(machine, "none"), read(machine, "sub")
    assert isinstance(missing, FileFailed)
    assert isinstance(folder, FileFailed)
    assert (missing.reason, folder.reason) == (MISSING, NOT_A_FILE)
    machine._channel = running
    machine.send(Interrupt())
    assert machine.finish(10).exit.reason == INTERRUPTED


def wait_for_output(machine: DrivenMachine) -> None:
    """Until the running cell has written something."""
    assert machine._next(20).kind == frames.STDOUT


def write(machine: DrivenMachine, path: str, data: bytes) -> object:
    machine._channel += 1
    machine.send(FileWrite(path))
    for start in range(0, len(data), frames.MAX_DATA_BYTES):
        piece = data[start : start + frames.MAX_DATA_BYTES]
        machine._send_all(frames.encode(frames.DATA, machine._channel, piece))
    machine.send(DataEnd())
    while True:
        message = from_guest(machine._next(20).payload)
        if not isinstance(message, Ack):
            return message


def read(machine: DrivenMachine, path: str) -> object:
    machine._channel += 1
    machine.send(FileRead(path))
    parts = []
    while True:
        frame = machine._next(20)
        if frame.kind == frames.DATA:
            parts.append(frame.payload)
            machine._send_all(frames.encode(frames.MESSAGE, machine._channel, to_payload(Ack(len(frame.payload)))))
            continue
        message = from_guest(frame.payload)
        if isinstance(message, FileDone):
            return b"".join(parts)
        if isinstance(message, FileFailed):
            return message
