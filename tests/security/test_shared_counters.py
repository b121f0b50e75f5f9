"""Promise: a sandbox that takes all it can of what the kernel counts per user, or for everybody, leaves others theirs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket

import pytest

from podflare.engines.process.engine import MAX_DEPTH

_AIO = """
kept = []
for size in (60000, 5000, 1000, 100, 10, 1):
    while True:
        context = ctypes.c_ulong()
        if libc.syscall(206 if X86 else 0, size, ctypes.byref(context)): break
        kept.append(context.value)
"""
TAKE_ALL = {
    "inotify instances": "kept = []\nwhile (fd := libc.inotify_init1(0)) != -1: kept.append(fd)",
    "descriptors on their way through sockets": """
import array, socket
kept = []
try:
    while True:
        left, right = socket.socketpair(); left.setblocking(False); kept += [left, right]
        try:
            while True: left.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 250))])
        except BlockingIOError: pass
except OSError: pass
""",
    "asynchronous input and output": _AIO,
    "pseudo terminals": """
kept = []
try:
    while True: kept.append(os.open("/dev/ptmx", os.O_RDWR))
except OSError: pass
""",
    "pages of pipes": """
import fcntl
kept = []
try:
    while True:
        kept.append(os.pipe())
        try: fcntl.fcntl(kept[-1][1], 1031, 1 << 20)
        except OSError: pass
except OSError: pass
""",
    "signals that wait": """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, {40})
class value(ctypes.Structure): _fields_ = [("v", ctypes.c_void_p)]
while libc.sigqueue(os.getpid(), 40, value()) == 0: pass
""",
    "bytes of message queues": """
for number in range(300):
    if libc.mq_open(b"/q%d" % number, 0o102, 0o600, None) == -1: break
""",
    "locked memory": """
import mmap
kept = []
try:
    while len(kept) < 64:
        kept.append(mmap.mmap(-1, 1 << 20))
        if libc.mlock(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(kept[-1]))), 1 << 20): break
except OSError: pass
""",
}
_HEAD = "import ctypes, os, platform\nX86 = platform.machine() == 'x86_64'\nlibc = ctypes.CDLL(None)\n"
USE = """
import ctypes, mmap, os, signal, socket
libc = ctypes.CDLL(None)
assert libc.inotify_init1(0) != -1
assert os.openpty()
r, w = os.pipe(); os.write(w, bytes(4096))
signal.setitimer(signal.ITIMER_REAL, 1000)
assert libc.timer_create(0, None, ctypes.byref(ctypes.c_void_p())) == 0
assert libc.mq_open(b"/mine", 0o102, 0o600, None) != -1
page = mmap.mmap(-1, 1 << 16)
assert libc.mlock(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(page))), 1 << 16) == 0
print("fine")
"""


@pytest.mark.parametrize("what", TAKE_ALL)
def test_others_have_theirs(attacker, new_machine, monkeypatch, what):
    """While one sandbox holds all it could get, another one is made, forks and works, and the machine's programs do, too."""
    taken = attacker.run(_HEAD + TAKE_ALL[what])
    assert taken.exit.code == 0, taken
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(0)
    assert fd != -1
    os.close(fd)
    context = ctypes.c_ulong()
    assert libc.syscall(206, 10, ctypes.byref(context)) == 0 and libc.syscall(207, context) == 0
    left, right = socket.socketpair()
    with left, right:
        socket.send_fds(left, [b"x"], [0])
    for fd in os.openpty():
        os.close(fd)
    other = new_machine()
    used = other.run(USE)
    assert used.stdout == "fine\n", used.stderr
    for depth in (MAX_DEPTH, 0):  # forked; and its memory carried, as at the last generation that can be forked
        monkeypatch.setattr("podflare.engines.process.engine.MAX_DEPTH", depth)
        with contextlib.closing(other.fork()[0]) as child:
            assert child.run("print(1)").stdout == "1\n"
