"""Promise: everything that a cell writes arrives, in order, whoever writes it, and memory stays bounded."""

from __future__ import annotations

import pytest
from guest_driver import resident_kib, wait_until

from podflare.guest.output import KEPT_BYTES
from podflare.wire import frames


def test_output_of_every_kind_of_writer(guest):
    """print, os.write, C stdio and subprocesses all arrive, each on its stream."""
    cell = guest.run("""
import ctypes, os, subprocess, sys
print("print")
os.write(1, b"os\\n")
libc = ctypes.CDLL(None); libc.puts(b"c"); libc.fflush(None)
subprocess.run("echo child; echo child-err >&2", shell=True)
print("err", file=sys.stderr)
""")
    assert cell.out == "print\nos\nc\nchild\n"
    assert cell.stderr == "child-err\nerr\n"


def test_all_output_comes_before_the_exit(guest):
    """A cell's exit is its last frame, after output that was written immediately before the end."""
    for size in (1, 70_000, 300_000):
        cell = guest.run(f"import sys; sys.stdout.write('x' * {size})")
        assert len(cell.stdout) == size
        assert cell.order[-1] == "exit"


def test_output_arrives_while_the_cell_runs(guest):
    """A printed line arrives before the cell ends."""
    channel = guest.start("import time\nprint('early')\ntime.sleep(60)")
    guest.wait_output(channel, b"early\n")
    guest.interrupt(channel)
    guest.finish(channel)


def test_unfinished_line_arrives_at_the_end(guest):
    """Text without a newline is not lost at the end of a cell, nor before a traceback."""
    assert guest.run("print('no newline', end='')").stdout == b"no newline"
    assert guest.run("print('a', end=''); 1 / 0").stdout == b"a"


def test_large_output_is_complete_and_in_order(guest):
    """Thirty megabytes of numbered lines arrive whole."""
    cell = guest.run("for i in range(300_000): print(f'{i:06d}', 'x' * 92)", timeout_s=60)
    assert [int(line[:6]) for line in cell.stdout.splitlines()] == list(range(300_000))


def test_a_line_of_many_megabytes(guest):
    """One line of 8 MB arrives whole."""
    assert guest.run("print('y' * 8_000_000)").stdout == b"y" * 8_000_000 + b"\n"


def test_binary_junk(guest):
    """Bytes that are no text, and bytes that look like frames, arrive unchanged and mean nothing."""
    forged = frames.encode(frames.MESSAGE, 1, b'{"op":"exit","code":0}') * 3
    cell = guest.run(f"import os; os.write(1, {forged!r} + bytes(range(256)) * 10)")
    assert cell.stdout == forged + bytes(range(256)) * 10
    assert cell.order[-1] == "exit"


def test_surrogates_can_be_printed(guest):
    """print() of a file name that is no UTF-8, or of a lone surrogate, does not fail."""
    cell = guest.run("print('\\udcff', '\\ud800'); import sys; print('\\udcff', file=sys.stderr)")
    assert cell.exit.code == 0
    assert cell.stdout == b"\\udcff \\ud800\n"


def test_output_between_cells_comes_with_the_next(guest):
    """What a thread or background process writes after its cell arrives at the start of the next one."""
    guest.bash("(sleep 0.1; echo from background; touch ~/done) & true")
    wait_until(lambda: (guest.home / "done").exists(), "the background process")
    cell = guest.run("print('now')")
    assert cell.out == "from background\nnow\n"


def test_flood_between_cells_keeps_the_end(guest):
    """Of a flood between cells the last part is kept, and the number of bytes before it is told."""
    guest.bash("(for i in $(seq 100000); do echo line $i; done; touch ~/done) & true")
    wait_until(lambda: (guest.home / "done").exists(), "the background process")
    cell = guest.run("pass")
    assert cell.out.endswith("line 100000\n")
    assert len(cell.stdout) <= KEPT_BYTES + 65536
    assert "bytes of stdout from before this cell were dropped" in cell.stderr


def test_background_flood_does_not_hold_up_cells(guest):
    """A process that writes without end in the background neither delays a cell's exit nor grows the agent."""
    guest.bash("yes >&2 & true")
    for number in range(20):
        cell = guest.run(f"print({number})", timeout_s=10)
        assert cell.out == f"{number}\n"
    assert resident_kib(guest.process.pid) < 40 * 1024


def test_host_that_does_not_read_holds_the_cell_back(guest):
    """With nobody reading, output is neither dropped nor buffered without bound, and arrives whole afterwards."""
    before = resident_kib(guest.process.pid)
    channel = guest.start("import os\nfor i in range(200): os.write(1, b'z' * 100_000)\nopen('end', 'w').close()")
    guest.wait_output(channel, b"zzz")
    assert not (guest.home / "end").exists()
    assert resident_kib(guest.process.pid) - before < 8 * 1024
    cell = guest.finish(channel)
    assert cell.exit.code == 0
    assert (guest.home / "end").exists()


@pytest.mark.parametrize(
    "breakage",
    [
        "import sys; sys.stdout.close(); sys.stderr.close()",
        "import sys; sys.stdout = sys.stderr = sys.stdin = None",
        "import sys; del sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__",
        "import os; os.close(0); os.close(1); os.close(2)",
        "import os; os.closerange(0, 51)",
        "import os; fd = os.open('log', os.O_CREAT | os.O_RDWR); [os.dup2(fd, n) for n in range(3)]",
        "import sys; sys.stdout.detach()",
        "import sys; sys.stdout.buffer.raw.close()",
        "import sys\nclass Odd:\n    closed = property(lambda s: 1 / 0)\nsys.stdout = sys.stderr = Odd()",
    ],
)
def test_broken_standard_streams_are_made_new(guest, breakage):
    """After a cell closed, removed or redirected the standard streams, the next one prints, and errors are seen."""
    first = guest.run(breakage)
    assert not first.exit.restarted, first.stderr
    cell = guest.run("import sys\nprint('out')\nprint('err', file=sys.stderr)\nsys.__stdout__.write('raw\\n')")
    assert (cell.out, cell.stderr) == ("out\nraw\n", "err\n")
    assert "ZeroDivisionError" in guest.run("1 / 0").stderr
    assert guest.run("input()").error.name == "EOFError"


def test_traceback_is_seen_though_stderr_was_closed(guest):
    """A cell that closes its standard error and then fails still shows its traceback."""
    assert "ZeroDivisionError" in guest.run("import os; os.closerange(0, 51); 1 / 0").stderr


def test_users_own_stdout_stays(guest):
    """A stream that user code puts in the place of sys.stdout stays there, as in any Python, until it is closed."""
    guest.run("import io, sys; sys.stdout = buffer = io.StringIO()")
    assert guest.run("print('captured')").out == ""
    assert guest.run("sys.stderr.write(buffer.getvalue())").stderr == "captured\n"
    guest.run("buffer.close()")
    assert guest.run("print('seen')").out == "seen\n"


def test_output_buffered_by_a_broken_stream_is_not_lost(guest):
    """Text that was printed without newline before the descriptor was closed arrives when it is restored."""
    assert guest.run("import os\nprint('held', end='')\nos.close(1)").out == "held"


def test_pipe_read_empty_by_user_code(guest):
    """Code that steals from its own output pipe loses that output, and its cell still ends."""
    cell = guest.run(
        "import os\nprint('x' * 10)\nfd = os.open('/proc/self/fd/1', os.O_RDONLY | os.O_NONBLOCK)\n"
        "try: os.read(fd, 4)\nexcept BlockingIOError: pass"
    )
    assert cell.exit.code == 0
    assert guest.run("print('next')").out.endswith("next\n")


def test_nonblocking_stdout_of_a_child_loses_nothing(guest):
    """A child that makes the shared standard output non-blocking does not make later prints fail."""
    guest.run("import os; os.set_blocking(1, False); os.set_blocking(2, False)")
    cell = guest.run("print('z' * 3_000_000)")
    assert len(cell.stdout) == 3_000_001, cell.stderr
