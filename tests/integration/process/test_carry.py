"""Machines that lie too deep to be forked: their memory is carried into a new machine, which can be forked again."""

from __future__ import annotations

import pytest

from podflare.errors import DeadlineExceeded, MachineFailed, PodflareError

pytestmark = pytest.mark.parametrize("way", ["carried"])


def test_a_carried_machine_is_forked_like_any_other(parent, fork, monkeypatch):
    """Generations go on and on: forked while that is possible, carried when it is not, each with what came before."""
    monkeypatch.setattr("podflare.engines.process.engine.MAX_DEPTH", 2)
    parent.run("steps = []")
    current = parent
    for turn in range(9):
        first, second = fork(current, 2)
        second.run("steps.append('wrong')")
        first.run(f"steps.append({turn})")
        current.close()
        second.close()
        current = first
    assert current.run("print(steps)").stdout == f"{list(range(9))}\n"
    assert current.machine.depth <= 2


def test_what_the_kernel_keeps_of_a_process_comes_along(parent, fork):
    """Signal handlers, the mask, umask, niceness, limits, and the alternate stack of faulthandler."""
    parent.run("""
import os, signal, resource, faulthandler
faulthandler.enable()
seen = []
signal.signal(signal.SIGUSR1, lambda *args: seen.append(args[0]))
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.umask(0o027); os.nice(3)
resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 4000))
""")
    (child,) = fork(parent)
    told = child.run("""
os.kill(os.getpid(), signal.SIGUSR1); os.kill(os.getpid(), signal.SIGUSR2)
print(seen, signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []), oct(os.umask(0o027)), os.nice(0))
print(resource.getrlimit(resource.RLIMIT_NOFILE), faulthandler.is_enabled(), os.getpid())
""")
    assert told.stdout == "[10] True 0o27 3\n(1000, 4000) True 2\n"


def test_libraries_loaded_meanwhile_work(parent, fork):
    """C modules, code made at run time, locale, regular expressions and big stacks go on working, threads start."""
    parent.run("""
import ctypes, decimal, sqlite3, threading, zlib, sys
callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(lambda n: n * 2)
base = sqlite3.connect('/root/base'); base.execute('create table t (n)'); base.commit()
big = bytearray(range(256)) * 100_000
""")
    (child,) = fork(parent)
    told = child.run("""
sys.setrecursionlimit(20_000)
def deep(n): return n and 1 + deep(n - 1)
base.execute('insert into t values (7)'); base.commit()
done = []
thread = threading.Thread(target=lambda: done.append(threading.get_native_id())); thread.start(); thread.join()
print(callback(21), decimal.Decimal(1) / 3, deep(8000), base.execute('select n from t').fetchall())
print(zlib.crc32(big), len(done), done[0] != threading.main_thread().native_id == threading.get_native_id())
""")
    assert told.stdout.splitlines()[0] == "42 0.3333333333333333333333333333 8000 [(7,)]", told
    assert told.stdout.splitlines()[1].endswith(" 1 True")
    assert parent.run("print(callback(2), base.execute('select count(*) from t').fetchone())").stdout == "4 (0,)\n"


def test_many_descriptors_come_along(parent, fork):
    """Six hundred open files, each at its position."""
    parent.run(
        "files = []\nfor n in range(600):\n    f = open(f'/tmp/f{n}', 'w+'); f.write(str(n)); f.flush(); files.append(f)"
    )
    (child,) = fork(parent)
    told = child.run(
        "print(all(f.write('x') and not f.flush() and open(f.name).read() == f'{n}x' for n, f in enumerate(files)))"
    )
    assert told.stdout == "True\n"
    assert parent.run("print(open('/tmp/f5').read())").stdout == "5\n"


def test_memory_that_was_given_back_is_empty(parent, fork):
    """Large blocks freed and asked for anew are zero, as any program expects of fresh memory."""
    parent.run("blocks = [bytearray(b'x') * 50_000_000 for _ in range(2)]; del blocks")
    (child,) = fork(parent)
    assert child.run("print(any(bytearray(50_000_000)), any(bytearray(3_000_000)))").stdout == "False False\n"


def test_filters_that_user_code_loaded_are_not_lost_in_silence(parent, fork):
    """A REPL under a system call filter of its own is refused, and goes on."""
    parent.run("""
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
program = struct.pack('HBBI', 6, 0, 0, 0x7fff0000)
buffer = ctypes.create_string_buffer(program)
fprog = struct.pack('H6xP', 1, ctypes.addressof(buffer))
print(libc.syscall(317, 1, 0, fprog))
""")
    with pytest.raises(MachineFailed, match="Seccomp_filters"):
        fork(parent)
    assert parent.run("print(1)").stdout == "1\n"


SABOTAGE = {
    "dies on its way": "import os; os._exit(3)",
    "raises": "raise ValueError('no')",
    "sends garbage": "import os; os.write(args[0], b'{'); __import__('time').sleep(1000)",
    "sends wrong numbers": "import os; os.write(args[0], b'{\"leaves\": true}'); os.write(args[0], b'{\"numbers\": [[99999, 1]]}')",
    "lies about the socket": 'import os; os.write(args[0], b\'{"leaves": true}\'); os.write(args[0], b\'{"numbers": [], "socket": true}\')',
    "floods": "import os\n    while True: os.write(args[0], b'{\"leaves\": true}')",
    "returns at once": "return {'control': 1, 'stdout': 1, 'stderr': 2, 'line': 1}",
}


TOLD = {
    "dies on its way": "the copy of the sandbox's Python process ended before it was copied",
    "raises": "the copy of the sandbox's Python process: ValueError: no",
    "sends wrong numbers": "a wrong number of a descriptor|ended before it was copied",
}


@pytest.mark.parametrize("how", SABOTAGE)
def test_a_repl_that_sabotages_its_journey_gets_an_error(parent, fork, how):
    """Whatever the copy does instead of leaving, the fork fails and says so, nothing is left, and the parent goes on."""
    parent.run(
        "import sys\nkept = 1\nframe = sys._getframe()\n"
        "while frame.f_globals.get('__name__') != 'podflare.guest.repl': frame = frame.f_back\n"
        f"def leave(*args):\n    {SABOTAGE[how]}\n"
        "frame.f_globals['passage'].leave = leave"
    )
    with pytest.raises(PodflareError, match=TOLD.get(how, ".")):
        fork(parent, timeout_s=20)
    assert parent.run("print(kept)").stdout.endswith("1\n")
    counted = parent.run("""
import os, time
end = time.monotonic() + 10
while (left := sorted(int(p) for p in os.listdir('/proc') if p.isdigit())) != [1, 2] and time.monotonic() < end: pass
print(left)
""")
    assert counted.stdout.endswith("[1, 2]\n"), "a copy was left behind"


def test_a_fork_that_is_given_up_while_memory_is_copied_leaves_nothing(parent, fork):
    """A deadline in the middle of the copy: no machine, no frozen copy, and the parent can be forked afterwards."""
    parent.run("big = bytearray(b'x') * 200_000_000")
    with pytest.raises(DeadlineExceeded):
        fork(parent, timeout_s=0.15)
    (child,) = fork(parent)
    assert child.run("print(len(big), big[-1])").stdout == "200000000 120\n"
