"""Promise: a bash cell is a fresh shell in the home directory; its end is told truly."""

from __future__ import annotations

import time

import pytest
from guest_driver import is_alive

from podflare.wire.messages import DIED, ENDED, INTERRUPTED


def test_output_and_exit_code(guest):
    """Both streams arrive, and the exit code is the shell's."""
    cell = guest.bash("echo out; echo err >&2; exit 3")
    assert (cell.out, cell.stderr, cell.exit.code, cell.exit.reason) == ("out\n", "err\n", 3, ENDED)


def test_starts_in_home_with_its_environment(guest):
    """A shell starts in the home directory with HOME, PATH and a UTF-8 locale, whatever Python changed."""
    guest.run("import os; os.chdir('/'); os.environ['HOME'] = '/nowhere'")
    cell = guest.bash('pwd; echo "$HOME"; echo "$LANG"; echo "$TERM"; command -v python3 >/dev/null && echo found')
    home = str(guest.home)
    assert cell.out.splitlines() == [home, home, "C.UTF-8", "dumb", "found"]


def test_nothing_carries_over_but_files(guest):
    """Variables of one shell are gone in the next; files stay and are those of Python."""
    guest.bash("x=1; cd /; echo data > ~/file")
    assert guest.bash('echo "[$x]"; pwd').out == f"[]\n{guest.home}\n"
    assert guest.run("print(open('file').read())").out == "data\n\n"


def test_home_that_was_removed(guest):
    """A shell starts in / when user code removed the home directory."""
    guest.run("import os; home = os.path.expanduser('~'); os.rename(home, home + '.moved')")
    try:
        assert guest.bash("pwd").out == "/\n"
    finally:
        guest.home.with_name(guest.home.name + ".moved").rename(guest.home)


def test_standard_input_is_at_its_end(guest):
    """read and cat do not wait."""
    assert guest.bash("cat; read x; echo $?").out == "1\n"


def test_background_process_does_not_hold_the_cell(guest):
    """A cell ends with its shell though a background process still holds its output; that process lives on."""
    started = time.monotonic()
    cell = guest.bash("sleep 63 & echo $!")
    assert time.monotonic() - started < 10
    assert is_alive(int(cell.out))


@pytest.mark.parametrize(("name", "number"), [("KILL", 9), ("TERM", 15), ("SEGV", 11)])
def test_shell_ended_by_a_signal(guest, name, number):
    """A shell that a signal ended gives 128 plus its number, and the REPL is not concerned."""
    guest.run("kept = 1")
    cell = guest.bash(f"kill -{name} $$")
    assert (cell.exit.code, cell.exit.reason, cell.exit.signal) == (128 + number, DIED, number)
    assert not cell.exit.restarted
    assert guest.run("kept").value == "1"


@pytest.mark.parametrize(
    "code",
    [
        "echo started; sleep 60",
        "echo started; sleep 60; echo next",
        "echo started; while true; do sleep 1; done",
        "echo started; while :; do :; done",
        "echo started; cat <(sleep 60)",
        "echo started; trap '' INT TERM; while :; do sleep 1; done",
        "echo started; set -m; sleep 60 & wait",
        # By itself once it is past its own start, in which KeyboardInterrupt is an error of another kind.
        "python3 -c 'import time; print(\"started\", flush=True); time.sleep(60)'",
    ],
)
def test_interrupt_ends_a_shell(guest, code):
    """An interrupt ends a shell and all it started, soon, even one that traps signals; no command after it runs."""
    guest.run("kept = 1")
    channel = guest.start(code, "bash")
    guest.wait_output(channel, b"started")
    guest.interrupt(channel)
    cell = guest.finish(channel, timeout_s=20)
    assert (cell.exit.code, cell.exit.reason) == (130, INTERRUPTED)
    assert "next" not in cell.out
    assert guest.run("kept").value == "1"


def test_interrupted_shell_may_clean_up(guest):
    """A shell's trap for INT runs."""
    channel = guest.start("trap 'echo cleaned; exit 7' INT; echo started; while :; do :; done", "bash")
    guest.wait_output(channel, b"started")
    guest.interrupt(channel)
    cell = guest.finish(channel)
    assert (cell.out, cell.exit.code, cell.exit.reason) == ("cleaned\n", 7, INTERRUPTED)


def test_interrupt_ends_what_a_shell_put_in_the_background(guest):
    """Daemons that an interrupted shell started, in sessions of their own, end with it."""
    channel = guest.start("setsid sleep 63 & echo pid $! end; sleep 60", "bash")
    seen = b""
    while b"end" not in seen:
        seen += guest.next_frame(channel).payload
    guest.interrupt(channel)
    guest.finish(channel)
    assert not is_alive(int(seen.split()[1]))


def test_kill_ends_a_shell_at_once(guest):
    """Kill ends a bash cell with SIGKILL and leaves the REPL alone."""
    guest.run("kept = 1")
    channel = guest.start("trap '' INT; echo started; while :; do :; done", "bash")
    guest.wait_output(channel, b"started")
    guest.kill(channel)
    cell = guest.finish(channel)
    assert (cell.exit.code, cell.exit.reason, cell.exit.restarted) == (137, DIED, False)
    assert guest.run("kept").value == "1"


def test_missing_bash(start_guest):
    """Without bash a cell says so and ends with 127."""
    guest = start_guest(environment={"PATH": "/nowhere"})
    guest.wait_ready()
    cell = guest.bash("echo hi")
    assert cell.exit.code == 127
    assert "bash is not installed" in cell.stderr


def test_invalid_code(guest):
    """Code that bash cannot take is bash's error."""
    assert guest.bash("if then").exit.code == 2
    assert guest.bash("a\0b").exit.code == 126


def test_very_long_code(guest):
    """A script above the kernel's limit for one argument runs."""
    assert guest.bash("echo start\n" + "# filler\n" * 100_000 + "echo end").out == "start\nend\n"


def test_nothing_of_the_agent_is_inherited(guest):
    """A shell and its children have no descriptor but the three standard ones."""
    assert guest.bash("ls /proc/self/fd").out.split() == ["0", "1", "2", "3"]  # 3 is ls's own look at the directory
