"""Many named attacks in one machine: each in a process of its own, judged by what it says, counted.

An attack is a piece of Python that calls `broke(what)` if it got through.  It held if it ends without that, with an
OSError, or dies.  Any other exception is a fault of the attack: one that cannot succeed proves nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping

from machines import DrivenMachine

HELD, BROKE, FAULTY, HUNG = "held", "broke", "faulty", "hung"

TOOLS = r"""
import array, ctypes, errno, fcntl, glob, json, mmap, os, platform, re, select, signal, socket, stat, struct, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)
X86 = platform.machine() == "x86_64"
class Broke(BaseException): pass
def broke(what): raise Broke(str(what)[:300])
def checked(result):
    if result == -1: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def call(number, *arguments):
    # The kernel reads six registers: what is not given is 0.
    padded = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments] + [ctypes.c_long(0)] * (6 - len(arguments))
    ctypes.set_errno(0)
    return checked(libc.syscall(ctypes.c_long(number), *padded))
def opens(path, flags=os.O_RDONLY):
    fd = os.open(path, flags | os.O_NONBLOCK); broke(f"opened {path}: {os.readlink(f'/proc/self/fd/{fd}')}")
"""

_RUNNER = r"""
def _run(code):
    try:
        exec(code, dict(globals()))
        return "held"
    except Broke as exc: return f"broke: {exc}"
    except OSError as exc: return "held"
    except BaseException as exc: return f"faulty: {type(exc).__name__}: {exc}"
def _attempt(code, limit_s):
    r, w = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(r)
        try: os.write(w, _run(code)[:4000].encode())
        finally: os._exit(0)
    os.close(w)
    said = b"hung"
    if select.select([r], [], [], limit_s)[0]:
        said = os.read(r, 4000) or b"held: it died"
    os.close(r)
    try: os.kill(pid, 9)
    except OSError: pass
    os.waitpid(pid, 0)
    return said.decode()
_found = {name: _run(PRELUDE + code) if INLINE else _attempt(PRELUDE + code, LIMIT_S) for name, code in ATTACKS.items()}
"""

_END = """
try: os.kill(-1, 9)
except OSError: pass
print(json.dumps(_found))
"""

LIMIT_S = 5.0


def program(attacks: Mapping[str, str], prelude: str = "", *, inline: bool = False) -> str:
    """A Python program that tries all of them and leaves what came of each, as text, in `_found`.

    Args:
        inline: they are harmless to the process that tries them, so one will do.
    """
    head = f"ATTACKS = {dict(attacks)!r}\nPRELUDE = {prelude!r}\nLIMIT_S = {LIMIT_S}\nINLINE = {inline}\n"
    return head + TOOLS + _RUNNER


def attempt_in(machine: DrivenMachine, attacks: Mapping[str, str], prelude: str = "") -> dict[str, str]:
    """What came of each attack, tried by forks of the machine's REPL; what they started is ended."""
    told = machine.run(program(attacks, prelude) + _END)
    try:
        found: dict[str, str] = json.loads(told.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise AssertionError(f"the attacks did not end as they should: {told}") from None
    assert found.keys() == attacks.keys()
    return found


def attempt_without_walls(attacks: Mapping[str, str], prelude: str = "") -> dict[str, str]:
    """What came of each where no wall is: as root of user, mount, PID and network namespaces of its own."""
    alone = "import ctypes, os\nfirst = os.getuid(), os.getgid()\n"
    alone += "assert ctypes.CDLL(None).unshare(0x7E020000) == 0\n"
    alone += (
        "for name, line in (('setgroups', 'deny'), ('uid_map', f'0 {first[0]} 1'), ('gid_map', f'0 {first[1]} 1')):\n"
    )
    alone += "    with open(f'/proc/self/{name}', 'w') as file: file.write(line)\n"
    alone += "pid = os.fork()\nif pid: os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    code = alone + program(attacks, prelude) + "print(json.dumps(_found))\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


Record = Callable[[Mapping[str, str]], None]
"""Takes what came of attacks, by their names."""
