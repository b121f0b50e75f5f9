"""Promise: neither the daemon's environment, arguments, sockets and memory nor the agent's can be read from inside."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from daemons import served
from machines import DrivenMachine

SECRET = "a-secret-of-the-daemon-4711"


@pytest.fixture
def secretive(monkeypatch, portal, private_temp, make_engine):
    """A machine whose daemon has a secret in its environment, as API keys are given to it."""
    monkeypatch.setenv("PODFLARE_API_KEYS", SECRET)
    monkeypatch.setenv("ANTHROPIC_API_KEY", SECRET)
    folder = Path(tempfile.mkdtemp(prefix="e", dir=private_temp))
    folder.chmod(0o711)
    engine = make_engine(folder)
    portal.call(engine.start)
    machine = DrivenMachine.create(portal, engine)
    yield machine
    machine.close()
    portal.call(engine.aclose)
    shutil.rmtree(folder)


@pytest.mark.both_engines
def test_the_daemons_environment_is_unknown(secretive, record):
    """No variable of the daemon reaches the sandbox, its agent included."""
    known = {
        "HOME",
        "LANG",
        "LOGNAME",
        "MPLBACKEND",
        "PATH",
        "SHELL",
        "TERM",
        "USER",
        "LC_CTYPE",
        "PWD",
        "OLDPWD",
        "SHLVL",
        "_",
    }
    found = {}
    for language, ask in (("python", "import os; print(*os.environ)"), ("bash", "env | cut -d= -f1")):
        strange = set(secretive.run(ask, language).stdout.split()) - known
        found[f"environment of {language}"] = f"broke: {strange}" if strange else "held"
    everything = "cat /proc/*/environ /proc/*/cmdline /proc/*/task/*/environ 2>/dev/null | tr '\\0' '\\n'"
    leaked = SECRET in secretive.run(everything, "bash").stdout
    found["environments and arguments of all processes"] = "broke" if leaked else "held"
    record(found)


@pytest.mark.any_engine
def test_no_memory_holds_the_daemons_secret(secretive):
    """The REPL was forked from processes that the daemon started, and finds nothing of its environment in its own memory."""
    searched = secretive.run("""
found = looked = 0
head, tail = b"a-secret-of-", b"the-daemon" + b"-4711"
with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
    for line in maps:
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if line.split()[1][0] != "r" or "[v" in line: continue
        try: memory.seek(start); data = memory.read(end - start)
        except (OSError, OverflowError, ValueError): continue
        looked += len(data); found += data.count(head + tail) if len(data) else 0
print(found <= 1, looked > 1 << 20)
""")
    assert searched.stdout == "True True\n", searched


AGENT = {
    f"/proc/1/{name}": f"broke(open('/proc/1/{name}', 'rb').read(1))"
    for name in ("mem", "environ", "maps", "smaps", "numa_maps", "auxv", "pagemap", "syscall", "stack", "io", "personality", "timers", "wchan.x")
} | {
    f"list /proc/1/{name}": f"broke(os.listdir('/proc/1/{name}'))" for name in ("fd", "fdinfo", "map_files", "task/1/fd", "ns/../fd")
} | {
    f"follow /proc/1/{name}": f"broke(os.readlink('/proc/1/{name}'))"
    for name in ("root", "cwd", "exe", "ns/mnt", "ns/pid", "ns/user", "fd/0", "task/1/root")
} | {
    "its memory written": "os.pwrite(os.open('/proc/1/mem', os.O_WRONLY), b'x', 4096); broke('wrote')",
    "a core of it": "os.kill(1, signal.SIGQUIT); time.sleep(0.05)\nif glob.glob('/core*') + glob.glob('/root/core*') + glob.glob('/tmp/core*'): broke('core')",
}  # fmt: skip


# What tells numbers only.  In a virtual machine the agent is of the same user id, and guards nothing.
NUMBERS = {"/proc/1/timers", "list /proc/1/fd", "list /proc/1/task/1/fd", "list /proc/1/ns/../fd"}


@pytest.mark.both_engines
def test_the_agents_memory_is_closed(attempt, engine_name):
    """The agent's memory, environment, descriptors and root cannot be opened, though it has the same user id."""
    left_out = NUMBERS if engine_name == "microvm" else set()
    attempt({name: attack for name, attack in AGENT.items() if name not in left_out})


SOCKETS = {
    "Unix sockets in its network namespace": """
rows = [line.split() for line in open("/proc/net/unix")][1:]
named = [row[7] for row in rows if len(row) > 7]
if named: broke(named)""",
    "other connections": "rows = [line for kind in ('tcp', 'tcp6', 'udp', 'udp6', 'raw') for line in open(f'/proc/net/{kind}')][5:]\nif any(rows): broke(rows)",
    "the daemon's address by name": "s = socket.socket(socket.AF_UNIX); s.connect(ADDRESS); broke('connected')",
    "the daemon's address by descriptor": "for fd in range(1024): s = socket.socket(socket.AF_UNIX); s.connect(f'/proc/1/fd/{fd}'); broke(fd)",
    "abstract names": "for name in ABSTRACT:\n    s = socket.socket(socket.AF_UNIX)\n    try: s.connect(name)\n    except OSError: continue\n    broke(name)",
    "abstract datagrams": "for name in ABSTRACT:\n    s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n    try: s.connect(name)\n    except OSError: continue\n    broke(name)",
}  # fmt: skip


@pytest.mark.both_engines
def test_the_daemons_sockets_are_out_of_reach(attempt, private_temp):
    """Neither a daemon's Unix socket nor any abstract one of the host can be connected to or seen."""
    path = private_temp / "sock-4711"
    with socket.socket(socket.AF_UNIX) as daemon, socket.socket(socket.AF_UNIX) as abstract:
        daemon.bind(str(path))
        path.chmod(0o666)
        daemon.listen()
        abstract.bind("\0podflare-test-4711")
        abstract.listen()
        lines = Path("/proc/net/unix").read_text().splitlines()[1:]
        names = ["\x00podflare-test-4711", *["\x00" + line.rsplit(" @", 1)[1] for line in lines if " @" in line][:50]]
        try:
            attempt(SOCKETS, f"ADDRESS, ABSTRACT = {str(path)!r}, {names!r}\n")
        finally:
            path.unlink()
        # A control: on the host both are open to everybody.
        with socket.socket(socket.AF_UNIX) as client:
            client.connect("\0podflare-test-4711")


def _opens_to_others(path: Path, top: Path) -> bool:
    """Whether another user could read the file: its mode allows it, and so do those of the directories that lead there."""
    if not path.stat().st_mode & stat.S_IROTH:
        return False
    return all(up.stat().st_mode & stat.S_IXOTH for up in path.parents if up.is_relative_to(top))


def test_another_local_user_finds_the_daemons_data_closed(private_temp):
    """Directories of a daemon, its Unix socket and its files open for nobody but its user (and, of root's, its sandboxes)."""
    folder = private_temp / "closed-4711"
    folder.mkdir(mode=0o755)
    door = private_temp / "door-4711"
    try:
        with served(folder, "--uds", str(door)) as daemon:
            assert stat.S_IMODE(door.stat().st_mode) == 0o600
            inside = [path for path in (folder / "d").rglob("*") if not path.is_symlink()]
            # The guest's program is no secret.
            inside = [path for path in inside if not any(part.startswith("bundle") for part in path.parts)]
            assert inside and [path for path in inside if path.stat().st_mode & stat.S_IWOTH] == []
            assert [path for path in inside if path.is_file() and _opens_to_others(path, folder)] == []
            if os.geteuid() == 0:
                code = "import os, socket\nos.setgroups([]); os.setgid(65533); os.setuid(65533)\ns = socket.socket(socket.AF_UNIX)\n"
                for attack in (
                    f"s.connect({str(door)!r})",
                    f"os.listdir({str(folder / 'd')!r} + '/instances')",
                    f"open('/proc/{daemon.pid}/environ').read()",
                    f"os.listdir('/proc/{daemon.pid}/fd')",
                ):
                    tried = subprocess.run(
                        [sys.executable, "-c", code + attack], capture_output=True, text=True, timeout=20, check=False
                    )
                    assert "PermissionError" in tried.stderr, (attack, tried)
    finally:
        shutil.rmtree(folder)
        door.unlink(missing_ok=True)
