"""Promise: a fork does not see or change its parent or its siblings, and a process that poses as a fork is ended."""

from __future__ import annotations

import os
import time

from attacking import BROKE, HELD, attempt_in

from forks import fork, parent, way
from podflare.errors import PodflareError

__all__ = ["fork", "parent", "way"]

PREPARE = r"""
import ctypes, mmap, os, select, signal, socket
libc = ctypes.CDLL(None)
open("/root/mark", "w").write("parent's"); open("/root/gone", "w").write("parent's")
os.mkdir("/root/d"); open("/root/d/mark", "w").write("parent's")
ways = {"a directory": os.open("/root/d", os.O_RDONLY), "the root": os.open("/", os.O_RDONLY), "a path": os.open("/root/d", os.O_PATH)}
ways |= {"/proc": os.open("/proc", os.O_RDONLY), "its own /proc": os.open("/proc/self", os.O_RDONLY), "/dev/shm": os.open("/dev/shm", os.O_RDONLY)}
ways["a removed directory"] = (os.mkdir("/root/r"), os.open("/root/r", os.O_RDONLY), os.rmdir("/root/r"))[1]
ways["standard input"] = 0
os.dup2(ways["the root"], 0)
files = {"a file": os.open("/root/mark", os.O_RDWR), "appended": os.open("/root/mark", os.O_RDWR | os.O_APPEND), "a path to a file": os.open("/root/mark", os.O_PATH)}
files["a removed file"] = os.open("/root/gone", os.O_RDWR); os.unlink("/root/gone")
files["a file in memory"] = os.memfd_create("x"); os.write(files["a file in memory"], b"parent's")
files["memory of the process"] = os.open("/proc/self/mem", os.O_RDWR)
spaces = {name: os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in os.listdir("/proc/self/ns")}
mine, theirs = socket.socketpair(); datagrams, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
server = socket.create_server(("127.0.0.1", 0)); address = server.getsockname()
named = socket.socket(socket.AF_UNIX); named.bind("/root/socket"); named.listen()
abstract = socket.socket(socket.AF_UNIX); abstract.bind("\0abstract"); abstract.listen()
mine.send(b"kept"); socket.send_fds(mine, [b"fd"], [ways["the root"]])
r, w = os.pipe(); os.mkfifo("/root/fifo"); fifo = os.open("/root/fifo", os.O_RDWR)
self_fd = os.pidfd_open(os.getpid()); agent_fd = os.pidfd_open(1)
event = libc.eventfd(0, 0); notify = libc.inotify_init1(0); libc.inotify_add_watch(notify, b"/root", 0xfff)
poller = select.epoll(); poller.register(r, select.EPOLLIN)
shared = mmap.mmap(-1, 4096); shared[:6] = b"parent"
mapped = mmap.mmap(files["a file"], 8)
libc.shmat.restype = ctypes.c_void_p
segment = libc.shmget(77, 4096, 0o1600); attached = libc.shmat(segment, None, 0); ctypes.memmove(attached, b"parent", 6)
libc.mq_open.restype = ctypes.c_int; queue = libc.mq_open(b"/q", 0o102, 0o600, None)
master, slave = os.openpty()
secret = os.urandom(16)
pid = os.getpid()
os.chdir("/root/d")
"""
CHANGES = {
    f"write through {name}": f"os.write(os.open('{target}', os.O_WRONLY | os.O_TRUNC, dir_fd=ways[{name!r}]), b'child')"
    for name, target in {
        "a directory": "mark", "the root": "root/mark", "a path": "mark", "its own /proc": "root/root/mark", "/proc": "self/root/root/mark",
        "standard input": "root/mark", "a removed directory": "../mark", "/dev/shm": "../../root/mark",
    }.items()
} | {
    f"up from {name}": f"os.write(os.open('../' * 20 + 'root/mark', os.O_WRONLY | os.O_TRUNC, dir_fd=ways[{name!r}]), b'child')"
    for name in ("a directory", "a path", "a removed directory", "standard input")
} | {
    f"write to {name}": f"os.pwrite(files[{name!r}], b'child', 0)" for name in ("a file", "appended", "a path to a file", "a removed file", "a file in memory")
} | {
    f"cut {name}": f"os.ftruncate(files[{name!r}], 0)" for name in ("a file", "appended", "a removed file", "a file in memory")
} | {
    f"seek in {name}": f"os.lseek(files[{name!r}], 3, 0)" for name in ("a file", "a removed file")
} | {
    f"open {name} anew": f"os.write(os.open('/proc/self/fd/%d' % files[{name!r}], os.O_RDWR), b'child')" for name in ("a file", "a path to a file", "a removed file", "a file in memory")
} | {
    "memory of the parent": "os.pwrite(files['memory of the process'], b'child' * 4, id(secret) + bytes.__basicsize__ - 1)",
    "relative to where it was": "open('mark', 'w').write('child')",
    "a shared mapping": "shared[:5] = b'child'",
    "a mapped file": "mapped[:5] = b'child'; mapped.flush()",
    "a segment": "ctypes.memmove(attached, b'child', 5)",
    "a segment by its number": "p = libc.shmat(segment, None, 0); p != -1 and p != 2 ** 64 - 1 and ctypes.memmove(p, b'child', 5)",
    "a segment by its key": "p = libc.shmat(libc.shmget(77, 4096, 0), None, 0); p not in (None, -1, 2 ** 64 - 1) and ctypes.memmove(p, b'child', 5)",
    "a socket": "mine.send(b'child')",
    "take from a socket": "theirs.setblocking(False); theirs.recv(10)",
    "descriptors that lie in a socket": "theirs.setblocking(False); theirs.recv(4); [os.write(os.open('root/mark', os.O_WRONLY | os.O_TRUNC, dir_fd=fd), b'child') for fd in socket.recv_fds(theirs, 9, 9)[1]]",
    "shut a socket down": "mine.shutdown(2); theirs.shutdown(2); server.shutdown(2)",
    "datagrams": "datagrams.send(b'child')",
    "its server": "socket.create_connection(address, 1).send(b'child')",
    "its server's connections": "server.settimeout(0.2); server.accept()",
    "a named socket": "s = socket.socket(socket.AF_UNIX); s.connect('/root/socket'); s.send(b'child')",
    "an abstract socket": "s = socket.socket(socket.AF_UNIX); s.connect('\\0abstract'); s.send(b'child')",
    "a pipe": "os.write(w, b'child')",
    "a FIFO": "os.write(os.open('/root/fifo', os.O_RDWR), b'child')",
    "an open FIFO": "os.write(fifo, b'child')",
    "an event": "os.write(event, (1).to_bytes(8, 'little'))",
    "an epoll instance": "poller.unregister(r)",
    "an inotify instance": "libc.inotify_rm_watch(notify, 1); os.set_blocking(notify, False); os.read(notify, 4096)",
    "a queue": "os.write(queue, b'child'); libc.mq_send(queue, b'child', 5, 0)",
    "a queue by its name": "q = libc.mq_open(b'/q', 2); q != -1 and libc.mq_send(q, b'child', 5, 0)",
    "a terminal": "os.write(slave, b'child')",
    "its pidfd": "signal.pidfd_send_signal(self_fd, 9)",
    "its agent's pidfd": "signal.pidfd_send_signal(agent_fd, 9)",
    "a descriptor by its pidfd": "call(438, self_fd, 0, 0); broke('getfd')",
} | {
    f"its namespaces: {name}": f"call(308 if X86 else 268, spaces[{name!r}], 0); os.path.exists('/root/only-parents') and broke('in its files'); where() != HOME and broke(where())"
    for name in ("mnt", "pid", "net", "ipc", "uts", "user", "cgroup", "time")
}  # fmt: skip
_WHERE = "def where(): return {name: os.readlink(f'/proc/self/ns/{name}') for name in os.listdir('/proc/self/ns')}\nHOME = where()\n"
LOOK = r"""
import json
os.set_blocking(r, False); os.set_blocking(fifo, False); os.set_blocking(master, False)
def read(fd):
    try: return os.read(fd, 99).decode()
    except BlockingIOError: return ""
def waiting(sock):
    try: sock.setblocking(False); sock.accept(); return True
    except BlockingIOError: return False
    except OSError: return "dead"
theirs.setblocking(False)
print(json.dumps([open("/root/mark").read(), open("/root/d/mark").read(), os.pread(files["a removed file"], 9, 0).decode(), os.pread(files["a file in memory"], 9, 0).decode(),
  [os.lseek(fd, 0, 1) for name, fd in files.items() if name in ("a file", "a removed file")], shared[:6].decode(), mapped[:8].decode(), ctypes.string_at(attached, 6).decode(),
  theirs.recv(4).decode(), read(r), read(fifo), read(master), [waiting(s) for s in (server, named, abstract)], poller.fileno() > 0 and poller.modify(r, 0) is None]))
"""


def test_a_fork_changes_nothing_of_its_parent(parent, fork, record):
    """Whatever the parent had open, mapped, bound or joined when it was forked, nothing that its fork does with it reaches the parent."""
    prepared = parent.run(PREPARE)
    assert prepared.exit.code == 0, prepared.stderr
    (child, untouched) = fork(parent, 2)
    parent.run("open('/root/only-parents', 'w').close(); os.set_blocking(notify, False); os.read(notify, 9999)")
    # What "nothing happened" looks like: the parent of a fork that did nothing.
    found = attempt_in(child, CHANGES, _WHERE)
    faults = {name: result for name, result in found.items() if not result.startswith(HELD)}
    seen = parent.run(LOOK)
    expected = (
        ["parent's"] * 4 + [[0, 0]] + ["parent", "parent's", "parent", "kept", "", "", "", [False, False, False], True]
    )
    told = eval(seen.stdout.replace("true", "True").replace("false", "False")) if seen.stdout else seen.stderr
    changed = "" if told == expected else f"{BROKE}: the parent has {told}"
    record({name: changed or faults.get(name, HELD) for name in found})
    assert untouched.run("print(open('/root/mark').read())").stdout == "parent's\n"


_LINE = """
import gc, json, os, socket, struct, sys, time
frame = sys._getframe()
while frame.f_globals.get("__name__") != "podflare.guest.repl": frame = frame.f_back
repl = frame.f_globals
(line,) = [one for one in gc.get_objects() if type(one).__name__ == "ForkLine"]
def packet(fd, body, pid=None, fds=()):
    with socket.socket(fileno=os.dup(fd)) as sock:
        extra = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, struct.pack("3i", pid, 0, 0))] if pid else []
        extra += [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
        sock.sendmsg([body if isinstance(body, bytes) else json.dumps(body).encode()], extra, socket.MSG_DONTWAIT)
def others(): return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) not in (1, os.getpid())]
def pose(children, *rest):
"""
# What the REPL does in the place of forking; it is ordered to fork itself into one new machine.
POSES = {
    "says that it is the child": "for one in children: packet(one.line, {'born': {}})",
    "has a child of its own say so": "\n    if not os.fork():\n        for one in children: packet(one.line, {'born': {}})\n        time.sleep(5); os._exit(0)",
    "names the agent as the child": "for one in children: packet(one.line, {'born': {}}, pid=1)",
    "names the new agent as the child": "for one in children: [packet(one.line, {'born': {}}, pid=pid) for pid in others()[:1]]",
    "names every process that it sees": "for one in children: [packet(one.line, {'born': {}}, pid=pid) for pid in others()]",
    "joins the child's files and says so": "\n    import ctypes\n    if not os.fork():\n        for one in children:\n            [ctypes.CDLL(None).setns(fd, 0) for fd in one.namespaces]; packet(one.line, {'born': {}})\n        time.sleep(5); os._exit(0)",
    "joins all but the process numbers": "\n    import ctypes\n    for one in children:\n        if not os.fork():\n            [ctypes.CDLL(None).setns(fd, 0) for fd in one.namespaces[1:]]; packet(one.line, {'born': {}}); time.sleep(5); os._exit(0)",
    "sends garbage": "for one in children: packet(one.line, os.urandom(100))",
    "sends deep JSON": "for one in children: packet(one.line, b'[' * 60000)",
    "sends a number for a report": "for one in children: packet(one.line, b'7')",
    "sends a number of a thousand digits": "for one in children: packet(one.line, b'{\"born\": ' + b'9' * 9000 + b'}')",
    "sends an empty packet": "for one in children: packet(one.line, b'')",
    "sends a packet that is too long": "for one in children: packet(one.line, b' ' * 100000)",
    "sends descriptors": "for one in children: packet(one.line, {'born': {}}, fds=[0] * 200)",
    "sends descriptors to the daemon": "packet(line.fd, {'order': 1, 'forked': True}, fds=[0] * 200)",
    "answers for another order": "for number in range(-50, 50): packet(line.fd, {'order': number, 'forked': True})",
    "answers twice": "packet(line.fd, {'order': line._order, 'forked': True}); packet(line.fd, {'order': line._order, 'forked': True})",
    "answers with what is no word": "packet(line.fd, {'order': line._order, 'forked': False, 'why': {'\\x1b]0;x': '\\ud800' * 5000}})",
    "says it is a new interpreter": "packet(line.fd, {'started': True})",
    "floods the daemon": "\n    fd = os.dup(line.fd)\n    for _ in range(2):\n        if not os.fork():\n            with socket.socket(fileno=fd) as sock:\n                until = time.monotonic() + 1\n                while time.monotonic() < until: sock.send(b'{}')\n            os._exit(0)",
    "floods the child's line": "\n    for one in children:\n        try:\n            while True: packet(one.line, {'born': {}})\n        except BlockingIOError: pass",
    "hands the child's line to a stranger": "\n    for one in children:\n        if not os.fork(): os.setsid(); packet(one.line, {'born': {'threads': ['x' * 10**4] * 5}}); time.sleep(5); os._exit(0)",
    "does nothing at all": "line.answer(False, 'no')",
    "returns another child": "return object()",
    "raises": "raise RuntimeError('\\x1b[2J')",
}  # fmt: skip


def test_no_process_passes_for_a_fork(new_machine, record):
    """Whatever a REPL says or sends instead of forking itself, no fork exists, its machine is gone, and the daemon is well."""
    found = {}
    parent = new_machine()
    machines = parent.machine.directory.parent
    before, descriptors = set(os.listdir(machines)), len(os.listdir("/proc/self/fd"))
    for name, attack in POSES.items():
        body = attack if attack.startswith("\n") else f"    {attack}"
        prepared = parent.run(f"{_LINE}{body}\nrepl['fork_children'] = pose")
        assert prepared.exit.code == 0, prepared
        start = time.monotonic()
        try:
            made = parent.fork(timeout_s=0.5)
            found[name] = f"{BROKE}: it passed"
            for one in made:
                one.close()
        except (PodflareError, TimeoutError):
            found[name] = HELD if set(os.listdir(machines)) == before else f"{BROKE}: a machine is left"
        if time.monotonic() - start > 15:
            found[name] = f"{BROKE}: it took {time.monotonic() - start:.0f} s"
        try:
            parent.run("import os; os._exit(0)", timeout_s=20)
            assert parent.run("print(2)", timeout_s=20).stdout == "2\n", name
        except (ConnectionError, TimeoutError):  # it hurt itself
            parent.close()
            parent = new_machine()
            before = set(os.listdir(machines))
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 3
    record(found)
