"""Promise: code in a sandbox neither sees nor signals a process outside of it, and has no privilege."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.both_engines
def test_only_own_processes_are_visible(attacker):
    """/proc lists the sandbox's processes only, first among them its agent as pid 1."""
    out = attacker.run("import os; print(sorted(int(p) for p in os.listdir('/proc') if p.isdigit()), os.getppid())")
    pids, parent = out.stdout.rsplit(" ", 1)
    assert parent.strip() == "1"
    assert len(pids.split(",")) <= 4, out.stdout


def test_signals_reach_nobody_outside(attacker, new_machine):
    """kill -9 to -1 and to every pid up to 40000 ends no process of the host or of another sandbox."""
    other = new_machine()
    other.run("kept = 42")
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        attacker.run("""
import os, signal
for pid in range(2, 40000):
    if pid != os.getpid():
        try: os.kill(pid, signal.SIGKILL)
        except OSError: pass
""")
        attacker.run("kill -9 -1", "bash")
        assert bystander.poll() is None
        assert other.run("print(kept)").stdout == "42\n"
    finally:
        bystander.kill()
        bystander.wait()
    assert os.getppid() > 0


@pytest.mark.both_engines
def test_the_agent_survives_every_signal(attacker):
    """Pid 1 of the sandbox cannot be ended or stopped from inside, and goes on to serve."""
    attacker.run("""
import os
for number in range(1, 65):
    try: os.kill(1, number)
    except OSError: pass
""")
    assert attacker.run("print('still here')").stdout == "still here\n"


def test_the_agents_memory_is_closed(attacker):
    """The agent's memory, environment, descriptors and root cannot be opened, though it has the same user id."""
    out = attacker.run("""
import os
for name in ("mem", "environ", "maps", "auxv", "pagemap", "syscall", "stack", "io"):
    try:
        with open(f"/proc/1/{name}", "rb") as f:
            print("OPEN", name, f.read(1))
    except OSError: pass
for name in ("fd", "map_files", "task/1/fd"):
    try: print("LIST", name, os.listdir(f"/proc/1/{name}"))
    except OSError: pass
for name in ("root", "cwd", "exe", "ns/mnt", "ns/pid", "ns/user"):
    try: print("LINK", name, os.readlink(f"/proc/1/{name}"))
    except OSError: pass
""")
    assert out.stdout == "", out.stdout


def test_no_capability_but_the_repls_two(attacker):
    """No process of the sandbox has an effective capability, but the REPL the two that fork needs; no exec passes on any."""
    out = attacker.run("import os; os.system('cat /proc/[0-9]*/status')")
    rows = [line.split() for line in out.stdout.splitlines()]
    for name in ("CapInh:", "CapBnd:", "CapAmb:"):
        assert {row[1] for row in rows if row[0] == name} == {"0000000000000000"}
    effective = [row[1] for row in rows if row[0] == "CapEff:"]
    assert sorted(effective)[-1] == "0000000000240000"
    assert effective.count("0000000000240000") == 1
    assert set(effective) == {"0000000000240000", "0000000000000000"}
    assert "NoNewPrivs:\t0" not in out.stdout
    assert "Seccomp:\t0" not in out.stdout


def test_the_repls_capabilities_open_nothing(attacker):
    """With CAP_SYS_ADMIN and CAP_SYS_CHROOT in its own user namespace a REPL can neither mount, chroot, rename the host, nor trace."""
    out = attacker.run("""
import ctypes, os, fcntl
libc = ctypes.CDLL(None, use_errno=True)
tried = {
  "chroot": libc.chroot(b"/tmp"), "mount": libc.mount(b"x", b"/mnt", b"tmpfs", 0, None), "umount": libc.umount2(b"/proc", 2),
  "sethostname": libc.sethostname(b"x", 1), "unshare": libc.unshare(0x20000), "ptrace": libc.ptrace(16, 1, 0, 0),
  "swapon": libc.swapon(b"/tmp/x", 0), "setdomainname": libc.setdomainname(b"x", 1), "acct": libc.acct(b"/tmp/x"),
}
print({name: result for name, result in tried.items() if result != -1})
for path in ("/proc/1/mem", "/proc/1/root", "/proc/1/environ", "/proc/sys/kernel/core_pattern", "/dev/kmsg"):
    try: open(path, "r+b").read(1); print("OPEN", path)
    except OSError: pass
try: os.setxattr("/root", "trusted.x", b"y"); print("TRUSTED")
except OSError: pass
""")
    assert out.stdout == "{}\n", out.stdout


@pytest.mark.both_engines
def test_identity_cannot_be_changed(attacker):
    """setuid, setgid, setgroups and chown to another id fail."""
    out = attacker.run("""
import os
open("/tmp/f", "w").close()
for call in (lambda: os.setuid(1), lambda: os.setgid(1), lambda: os.setgroups([1]), lambda: os.chown("/tmp/f", 1, 1), lambda: os.setresuid(1, 1, 1)):
    try:
        call()
        print("CHANGED")
    except OSError: pass
""")
    assert out.stdout == "", out.stdout


@pytest.mark.both_engines
def test_the_daemons_environment_is_unknown(attacker):
    """No variable of the daemon reaches the sandbox."""
    out = attacker.run("import os; print(sorted(os.environ))")
    allowed = {"HOME", "LANG", "LOGNAME", "MPLBACKEND", "PATH", "SHELL", "TERM", "USER", "LC_CTYPE", "PWD", "OLDPWD"}
    assert set(eval(out.stdout)) <= allowed
