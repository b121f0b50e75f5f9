"""Promise: only allowed system calls work; those that make or change namespaces, mounts and kernels never do."""

from __future__ import annotations

import pytest

_CALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(*args):
    ctypes.set_errno(0)
    result = libc.syscall(*[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    return result, ctypes.get_errno()
"""


@pytest.mark.parametrize("flag", [0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000])
def test_no_new_namespace(attacker, flag):
    """unshare and clone with any namespace flag fail with EPERM, clone3 with ENOSYS."""
    out = attacker.run(
        _CALL
        + f"""
import platform
clone, unshare = (56, 272) if platform.machine() == "x86_64" else (220, 97)
print(call(unshare, {flag}), call(clone, {flag} | 17, 0, 0, 0, 0), call(clone, {flag} | (1 << 40) | 17, 0, 0, 0, 0), call(435, 0, 0))
"""
    )
    assert out.stdout == "(-1, 1) (-1, 1) (-1, 1) (-1, 38)\n", out.stdout + out.stderr


def test_mounts_of_every_interface_are_refused(attacker):
    """mount, umount, pivot_root, chroot and the whole new mount interface answer EPERM."""
    out = attacker.run(
        _CALL
        + """
print({call(n, 0, 0, 0, 0, 0) for n in (165, 166, 155, 161, 428, 429, 430, 431, 432, 433, 442)})
"""
    )
    assert out.stdout == "{(-1, 1)}\n", out.stdout


def test_joining_a_namespace_leads_nowhere(attacker, new_machine):
    """setns to every namespace descriptor that can be opened leaves the REPL where it is, and fails in all else it starts."""
    new_machine()
    attacker.run("import os; before = {n: os.readlink(f'/proc/self/ns/{n}') for n in os.listdir('/proc/self/ns')}")
    attacker.run(
        _CALL
        + """
import glob
for path in glob.glob("/proc/*/ns/*"):
    try: fd = os.open(path, os.O_RDONLY)
    except OSError: continue
    call(308, fd, 0)
    for request in (0xB701, 0xB702):  # NS_GET_USERNS, NS_GET_PARENT
        import fcntl
        try: up = fcntl.ioctl(fd, request)
        except OSError: continue
        call(308, up, 0); os.close(up)
    os.close(fd)
"""
    )
    out = attacker.run(
        "print(before == {n: os.readlink(f'/proc/self/ns/{n}') for n in os.listdir('/proc/self/ns')}, os.path.exists('/etc/shadow'))"
    )
    assert out.stdout == "True False\n", out.stdout + out.stderr
    out = attacker.run(
        "nsenter --target $$ --net true && echo JOINED; nsenter --target $$ --mount true && echo JOINED", "bash"
    )
    assert out.stdout == "", out.stdout


def test_kernel_surface_is_closed(attacker):
    """bpf, perf, keys, userfaultfd, ptrace, process memory, modules, kexec, reboot, clocks: EPERM; io_uring: ENOSYS."""
    out = attacker.run(
        _CALL
        + """
numbers = dict(bpf=321, perf=298, keyctl=250, add_key=248, request_key=249, userfaultfd=323, ptrace=101, vm_readv=310,
  vm_writev=311, init_module=175, finit_module=313, delete_module=176, kexec=246, reboot=169, settime=227, handle=304,
  kcmp=312, swapon=167, acct=163, syslog=103, getfd=438, iopl=172, quotactl=179, fanotify=300)
print({name: call(n, 0, 0, 0, 0, 0, 0) for name, n in numbers.items() if call(n, 0, 0, 0, 0, 0, 0) != (-1, 1)})
print({call(n, 0, 0, 0, 0, 0, 0) for n in (425, 426, 427)})
"""
    )
    assert out.stdout == "{}\n{(-1, 38)}\n", out.stdout


def test_other_architectures_calls_are_refused(attacker):
    """x32 numbers and the 32-bit entry point reach no call that the filter did not look at."""
    out = attacker.run(
        _CALL
        + """
print({call(0x40000000 + n, 0, 0, 0, 0, 0) for n in (39, 56, 101, 165, 272, 520, 545)})
"""
    )
    assert out.stdout == "{(-1, 38)}\n", out.stdout
    code = """
import ctypes, mmap
# mov eax, 20 (getpid, 32-bit table); int 0x80; ret
page = mmap.mmap(-1, 4096, prot=7); page.write(b"\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3")
function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
print(function())
"""
    out = attacker.run(code)
    assert out.stdout == "-38\n" or out.exit.reason == "died", out.stdout


def test_terminal_injection_is_refused(attacker):
    """TIOCSTI and TIOCLINUX fail on a terminal of the sandbox's own, with high bits set as well."""
    out = attacker.run("""
import fcntl, os, pty, ctypes
master, slave = pty.openpty()
libc = ctypes.CDLL(None, use_errno=True)
for request in (0x5412, 0x541C, 0x5412 | 1 << 32, 0x541C | 7 << 40):
    print(libc.ioctl(slave, ctypes.c_ulong(request), ctypes.byref(ctypes.c_char(b"x"))), ctypes.get_errno())
""")
    assert out.stdout == "-1 1\n" * 4, out.stdout + out.stderr


def test_ordinary_programs_are_not_disturbed(attacker):
    """Threads, subprocesses, sqlite, sockets, mmap, pipes, terminals and multiprocessing work under the filter."""
    out = attacker.run("""
import concurrent.futures, mmap, multiprocessing, pty, sqlite3, subprocess, tempfile, threading
with concurrent.futures.ThreadPoolExecutor(8) as pool: assert sum(pool.map(lambda x: x, range(100))) == 4950
assert subprocess.run(["sh", "-c", "echo $((6*7)) | cat"], capture_output=True, text=True).stdout == "42\\n"
db = sqlite3.connect("/root/t.db"); db.execute("create table t(x)"); db.commit()
mmap.mmap(-1, 1 << 20).close()
master, slave = pty.openpty()
with tempfile.TemporaryDirectory() as d: open(d + "/x", "w").write("y")
def square(x): return x * x
with multiprocessing.get_context("fork").Pool(2) as pool: assert pool.map(square, range(5)) == [0, 1, 4, 9, 16]
print("fine")
""")
    assert out.stdout == "fine\n", out.stderr
