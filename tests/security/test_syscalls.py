"""Promise: only allowed system calls work; those that make or change namespaces, mounts and kernels never do."""

from __future__ import annotations

import json
import platform

import pytest
from attacking import attempt_without_walls, program

NAMESPACES = {
    f"{name} by {way}": code.format(flag=flag)
    for name, flag in {
        "mount": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000, "pid": 0x20000000,
        "net": 0x40000000,
    }.items()
    for way, code in {
        "unshare": "checked(libc.unshare({flag})); broke('unshare')",
        "unshare with a user namespace": "checked(libc.unshare({flag} | 0x10000000)); broke('unshare')",
        "clone": "if call(56 if X86 else 220, {flag} | 17) == 0: os._exit(0)\nbroke('clone')",
        "clone with high bits": "if call(56 if X86 else 220, {flag} | 1 << 40 | 17) == 0: os._exit(0)\nbroke('clone')",
        "clone3": "if call(435, ctypes.create_string_buffer(struct.pack('11Q', {flag}, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0)), 88) == 0: os._exit(0)\nbroke('clone3')",
    }.items()
} | {
    "time by unshare": "checked(libc.unshare(0x80)); broke('unshare')",
    "time by clone3": "if call(435, ctypes.create_string_buffer(struct.pack('11Q', 0x80, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0)), 88) == 0: os._exit(0)\nbroke('clone3')",
    "a cgroup by clone3": "if call(435, ctypes.create_string_buffer(struct.pack('11Q', 0x200000000, 0, 0, 0, 17, 0, 0, 0, 0, 0, os.open('/', os.O_RDONLY))), 88) == 0: os._exit(0)\nbroke('clone3')",
    "a program that does it": "if subprocess.run(['unshare', '-r', 'true']).returncode == 0: broke('unshare -r')",
}  # fmt: skip


def test_no_new_namespace(attempt):
    """unshare, clone and clone3 make no namespace of any kind, nested user namespaces included."""
    attempt(NAMESPACES)


MOUNTS = {
    "mount": "call(165 if X86 else 40, ctypes.c_char_p(b'x'), ctypes.c_char_p(b'/mnt'), ctypes.c_char_p(b'tmpfs')); broke('mount')",
    "umount2": "call(166 if X86 else 39, ctypes.c_char_p(b'/proc'), 2); broke('umount')",
    "pivot_root": "call(155 if X86 else 41, ctypes.c_char_p(b'/'), ctypes.c_char_p(b'/mnt')); broke('pivot_root')",
    "open_tree": "call(428, -100, ctypes.c_char_p(b'/'), 1 | 0x8000); broke('open_tree')",
    "move_mount": "call(429, os.open('/', os.O_PATH), ctypes.c_char_p(b''), -100, ctypes.c_char_p(b'/mnt'), 4); broke('move_mount')",
    "fsopen": "broke(call(430, ctypes.c_char_p(b'tmpfs'), 0))",
    "fsconfig": "call(431, 0, 0, ctypes.c_char_p(b'x'), 0, 0); broke('fsconfig')",
    "fsmount": "call(432, 0, 0, 0); broke('fsmount')",
    "fspick": "broke(call(433, -100, ctypes.c_char_p(b'/'), 0))",
    "mount_setattr": "call(442, -100, ctypes.c_char_p(b'/'), 0x8000, ctypes.create_string_buffer(struct.pack('4Q', 0, 1, 0, 0)), 32); broke('mount_setattr')",
    "open_tree_attr": "call(467, -100, ctypes.c_char_p(b'/'), 1, 0, 0); broke('open_tree_attr')",
    "listmount": "call(458, ctypes.create_string_buffer(struct.pack('IIQQQ', 32, 0, 0xffffffffffffffff, 0, 0)), ctypes.create_string_buffer(4096), 512, 0); broke('listmount')",
    "a way over FUSE": "broke(os.open('/dev/fuse', os.O_RDWR))",
    "a way over a loop device": "broke(os.open('/dev/loop-control', os.O_RDWR))",
}  # fmt: skip


def test_mounts_of_every_interface_are_refused(attempt):
    """mount, umount, pivot_root and the whole new mount interface are refused, with arguments that would work."""
    attempt(MOUNTS)


_FIND = """
def candidates():
    for path in glob.glob("/proc/*/ns/*") + glob.glob("/proc/*/task/*/ns/*") + glob.glob("/proc/*/fd/*"):
        try:
            if not stat.S_ISFIFO(os.stat(path).st_mode): yield os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError: pass
    for pid in range(1, 40):
        try: yield os.pidfd_open(pid)
        except OSError: pass
    yield os.memfd_create("x"); yield os.open("/proc/1", os.O_RDONLY); yield os.open("/", os.O_RDONLY)
    for name in os.listdir("/proc/self/fd"):
        try: yield struct.unpack("i", socket.socket(fileno=os.dup(int(name))).getsockopt(1, 77, 4))[0]
        except OSError: pass
def where(): return {name: os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")}
HOME = where(), os.stat("/").st_ino
KINDS = (0, 0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000, 0x7e020000)
def settle():
    if (where(), os.stat("/").st_ino) != HOME or os.path.exists("/etc/shadow"): broke((where(), HOME))
"""
_WALK = {
    "its parent": 0xB702, "its user namespace": 0xB701, "the next mount namespace": 0x8010B70B, "the one before": 0x8010B70C,
    "its kind": 0xB703, "its owner": 0xB704,
}  # fmt: skip
JOINS = {
    f"setns to all that can be opened, as {kind:#x}": f"""
for fd in candidates():
    try: call(308 if X86 else 268, fd, {kind})
    except OSError: pass
    os.close(fd); settle()
"""
    for kind in (0, 0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000, 0x7e020000)
} | {
    f"from a namespace to {name}": f"""
for fd in candidates():
    try: found = fcntl.ioctl(fd, {request}, bytearray(struct.pack("IIQ", 16, 0, 0)))
    except OSError: continue
    if os.readlink(f"/proc/self/fd/{{fd}}").split(":")[0] in ("mnt", "pid", "user", "net"): broke(found)
"""
    for name, request in _WALK.items()
} | {
    f"from a pidfd to its namespace {number}": f"for pid in range(1, 40):\n    try: fd = os.pidfd_open(pid)\n    except OSError: continue\n    try: broke(fcntl.ioctl(fd, 0xFF00 + {number}))\n    except OSError: pass"
    for number in range(1, 11)
} | {
    "from a socket to its network namespace": "broke(fcntl.ioctl(socket.socket(), 0x894C))",
    "a program that does it": "for kind in ('net', 'mount', 'user', 'pid', 'ipc', 'uts'):\n    if subprocess.run(['nsenter', '--target', '1', '--' + kind, 'true'], capture_output=True).returncode == 0: broke(kind)",
    "a program for its own namespaces": "for kind in ('net', 'mount', 'ipc', 'uts'):\n    if subprocess.run(['nsenter', '--target', str(os.getpid()), '--' + kind, 'true'], capture_output=True).returncode == 0: broke(kind)",
}  # fmt: skip


def test_joining_a_namespace_leads_nowhere(attempt, new_machine):
    """From no descriptor that a REPL can find or make does setns, or a namespace's own ioctl, lead anywhere else."""
    new_machine()
    attempt(JOINS, _FIND)


KERNEL = {
    "bpf": "call(321 if X86 else 280, 0, ctypes.create_string_buffer(struct.pack('5I', 2, 4, 8, 1, 0) + bytes(100)), 120); broke('bpf')",
    "a bpf program": "call(321 if X86 else 280, 5, ctypes.create_string_buffer(128), 128); broke('bpf')",
    "perf_event_open": "call(298 if X86 else 241, ctypes.create_string_buffer(struct.pack('II', 1, 112) + bytes(104)), 0, -1, -1, 0); broke('perf')",
    "a key of its own": "call(248 if X86 else 217, ctypes.c_char_p(b'user'), ctypes.c_char_p(b'k'), ctypes.c_char_p(b'v'), 1, -3); broke('add_key')",
    "keys of the session": "call(250 if X86 else 219, 11, -3, 0, 0); broke('keyctl')",
    "a key from user space": "call(249 if X86 else 218, ctypes.c_char_p(b'user'), ctypes.c_char_p(b'k'), 0, -3); broke('request_key')",
    "userfaultfd": "broke(call(323 if X86 else 282, 1))",
    "userfaultfd's device": "broke(os.open('/dev/userfaultfd', os.O_RDWR))",
    "io_uring_setup": "broke(call(425, 4, ctypes.create_string_buffer(120)))",
    "io_uring_enter": "broke(call(426, 0, 0, 0, 0))",
    "io_uring_register": "broke(call(427, -1, 0, 0, 0))",
    "io_setup": "broke(call(206 if X86 else 0, 1, ctypes.byref(ctypes.c_ulong())))",
    "memory that even the kernel cannot see": "broke(call(447, 0))",
    "fanotify": "broke(call(300 if X86 else 262, 0, 0))",
    "fanotify for users": "broke(call(300 if X86 else 262, 0x600, 0))",
    "a module": "call(313 if X86 else 273, os.open('/root', os.O_RDONLY), ctypes.c_char_p(b''), 0); broke('module')",
    "delete a module": "call(176 if X86 else 106, ctypes.c_char_p(b'overlay'), 0x800); broke('module')",
    "kexec": "call(246 if X86 else 104, 0, 0, 0, 0); broke('kexec')",
    "kexec of a file": "call(320 if X86 else 294, -1, -1, 0, 0, 0); broke('kexec')",
    "the clock": "time.clock_settime(time.CLOCK_REALTIME, time.time()); broke('clock')",
    "the clock's speed": "call(159 if X86 else 171, ctypes.create_string_buffer(struct.pack('I', 1) + bytes(300))); broke('adjtimex')",
    "another clock's speed": "call(305 if X86 else 266, 0, ctypes.create_string_buffer(struct.pack('I', 1) + bytes(300))); broke('clock_adjtime')",
    "ports of the machine": "call(172 if X86 else 9999, 3); broke('iopl')",
    "some ports": "call(173 if X86 else 9999, 0x80, 1, 1); broke('ioperm')",
    "segments of its own": "call(154 if X86 else 9999, 1, ctypes.create_string_buffer(16), 16); broke('modify_ldt')",
    "the kernel's log": "call(103 if X86 else 116, 2, ctypes.create_string_buffer(64), 64); broke('syslog')",
    "no address randomisation": "call(135 if X86 else 92, 0x40000); broke('personality')",
    "memory at address 0": "mapped = libc.mmap; mapped.restype = ctypes.c_long\nif mapped(None, 4096, 3, 0x32, -1, 0) == 0: broke('page 0')",
    "a policy for memory": "call(237 if X86 else 235, 0, 4096, 2, 0, 0, 0); broke('mbind')",
    "pages of a node": "call(238 if X86 else 237, 0, 0, 0); broke('set_mempolicy')",
    "landlock off": "call(446, -1, 0); broke('landlock')",
    "lsm attributes": "call(460, 100, ctypes.create_string_buffer(64), 64, 0); broke('lsm')",
    "shadow stacks of others": "call(453, 0, 4096, 0) and broke('map_shadow_stack')",
    "other listings of namespaces": "call(470, ctypes.create_string_buffer(64), ctypes.create_string_buffer(64), 1, 0); broke('listns')",
    "uselib": "call(134 if X86 else 9999, ctypes.c_char_p(b'/bin/true')); broke('uselib')",
}  # fmt: skip


def test_kernel_surface_is_closed(attempt):
    """bpf, perf, keys, userfaultfd, io_uring, modules, kexec, clocks, ports: none can be used, with sound arguments."""
    attempt(KERNEL)


FAMILIES = {
    f"family {family}, kind {kind}": f"socket.socket({family}, {kind}, 0); broke('opened')"
    for family in range(60)
    for kind in (1, 2, 3, 4, 5, 6, 10)
    if (family, kind) not in {(1, 1), (1, 2), (1, 5), (2, 1), (2, 2), (10, 1), (10, 2)} and (family, kind) != (1, 3)
} | {
    "raw ICMP": "socket.socket(2, 3, 1); broke('raw')",
    "raw IP": "socket.socket(2, 3, 255); broke('raw')",
    "raw ICMPv6": "socket.socket(10, 3, 58); broke('raw')",
    "netlink route": "socket.socket(16, 3, 0); broke('netlink')",
    "netlink audit": "socket.socket(16, 3, 9); broke('netlink')",
    "netlink netfilter": "socket.socket(16, 3, 12); broke('netlink')",
    "netlink pair": "socket.socketpair(16, 3); broke('netlink')",
    "vsock": "socket.socket(40, 1, 0); broke('vsock')",
    "crypto": "socket.socket(38, 5, 0); broke('alg')",
    "a family with high bits": "call(41 if X86 else 198, 16 | 1 << 32, 3, 0); broke('netlink')",
    "a kind with flags": "call(41 if X86 else 198, 2, 3 | 0o2000000, 1); broke('raw')",
    "SMC by protocol": "socket.socket(2, 1, 256); broke('smc')",
    "MPTCP's path manager": "socket.socket(16, 3, 16); broke('netlink')",
}  # fmt: skip


def test_special_sockets_are_refused(attacker, record):
    """Netlink, packet, raw, vsock, alg, bluetooth and all others but Unix and IP streams and datagrams cannot be opened."""
    # Harmless for the process that tries, so all in one.
    tried = attacker.run(program(FAMILIES, inline=True) + "print(json.dumps(_found))")
    record(json.loads(tried.stdout))


_ENTRY = """
def enter(code):
    page = mmap.mmap(-1, 4096, prot=7); page.write(code)
    result = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
    if -4096 < result < 0: raise OSError(-result, "refused")
    broke(result)
def by_int80(number, ebx=0, ecx=0):
    # push rbx; mov eax, number; mov ebx, ...; mov ecx, ...; xor edx, edx; int 0x80; pop rbx; ret
    enter(b"\\x53\\xb8" + struct.pack("<I", number) + b"\\xbb" + struct.pack("<I", ebx) + b"\\xb9" + struct.pack("<I", ecx) + b"\\x31\\xd2\\xcd\\x80\\x5b\\xc3")
"""
FOREIGN = (
    {
        f"int 0x80: {name}": f"by_int80({number}, {first})"
        for name, number, first in (
            ("getpid", 20, 0),
            ("fork", 2, 0),
            ("open", 5, 0),
            ("mount", 21, 0),
            ("setuid", 23, 0),
            ("ptrace", 26, 0),
            ("socketcall", 102, 1),
            ("clone", 120, 0x10000011),
            ("unshare", 310, 0x10000000),
            ("unshare alone", 310, 0x20000),
            ("setns", 346, 0),
            ("keyctl", 288, 0),
            ("bpf", 357, 0),
            ("socket", 359, 16),
            ("userfaultfd", 374, 0),
            ("clone3", 435, 0),
            ("io_uring_setup", 425, 1),
            ("chroot", 61, 0),
        )
    }
    | {
        f"x32: {number}": f"call(0x40000000 + {number}, 0x10000000, 0, 0, 0, 0, 0); broke('x32')"
        for number in (0, 1, 39, 41, 56, 59, 101, 165, 272, 308, 321, 425, 520, 545)
    }
    | {
        "a number above all": "call(0x7fffffff); broke('called')",
        "a negative number": "call(-10); broke('called')",
        "high bits of a number": "call((1 << 32) | 272, 0x10000000); broke('called')",
        "sysenter": "enter(b'\\xb8\\x14\\x00\\x00\\x00\\x0f\\x34\\xc3')",
        "a far jump into 32-bit code": """
page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40, prot=7)
start = ctypes.addressof(ctypes.c_char.from_buffer(page))
page.seek(64); page.write(b"\\xb8\\x36\\x01\\x00\\x00\\xbb\\x00\\x00\\x00\\x10\\xcd\\x80\\xeb\\xfe")  # unshare(user), then for ever
page.seek(0); page.write(b"\\xff\\x2d\\x00\\x00\\x00\\x00" + struct.pack("<IH", start + 64, 0x23))
if not os.fork(): ctypes.CFUNCTYPE(ctypes.c_int)(start)()
time.sleep(0.1)
for name in os.listdir("/proc"):
    if name.isdigit() and os.readlink("/proc/self/ns/user") != os.readlink(f"/proc/{name}/ns/user"): broke(name)
""",
    }
)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="machine code of x86_64")
def test_other_architectures_calls_are_refused(attempt):
    """x32 numbers and the 32-bit entry points, entered by machine code of the attacker's own, reach no call."""
    attempt(FOREIGN, _ENTRY)


@pytest.mark.control
def test_these_attacks_succeed_where_nothing_stops_them():
    """Without the filter what it refuses comes through: the attacks can tell."""
    tried = {
        name: attack
        for name, attack in NAMESPACES.items()
        if name.startswith(("uts", "ipc", "user by", "net")) and "a user" not in name
    }
    tried |= {name: MOUNTS[name] for name in ("mount", "open_tree", "fsopen", "fspick", "listmount")}
    tried |= {name: JOINS["from a namespace to " + name] for name in ("its user namespace", "its owner")}
    tried |= {name: KERNEL[name] for name in ("io_setup", "a key of its own", "no address randomisation")}
    if platform.machine() == "x86_64":
        tried |= {name: FOREIGN[name] for name in ("int 0x80: unshare", "int 0x80: clone", "high bits of a number")}
    found = attempt_without_walls(tried, _FIND + _ENTRY)
    assert {name: result.split(":")[0] for name, result in found.items()} == dict.fromkeys(tried, "broke")


INJECTIONS = {
    f"{name}, bits {high:#x}": f"""
master, slave = os.openpty()
checked(libc.ioctl(slave, ctypes.c_ulong({request} | {high}), ctypes.byref(ctypes.c_char(b"x")))); broke("injected")"""
    for name, request in {"TIOCSTI": 0x5412, "TIOCLINUX": 0x541C}.items()
    for high in (0, 1 << 32, 7 << 40, 1 << 63)
} | {
    "TIOCSTI on its own terminal": "fcntl.ioctl(os.open('/dev/tty', os.O_RDWR), 0x5412, b'x'); broke('injected')",
    "TIOCSTI on standard output": "fcntl.ioctl(1, 0x5412, b'x'); broke('injected')",
    "TIOCSTI on standard error": "fcntl.ioctl(2, 0x5412, b'x'); broke('injected')",
    "a console": "broke(os.open('/dev/console', os.O_RDWR))",
    "a virtual terminal": "broke(os.open('/dev/tty1', os.O_RDWR))",
    "terminals of the host": "\nfor n in range(50): broke(os.open(f'/dev/pts/{n}', os.O_RDWR))",
}


def test_terminal_injection_is_refused(attempt):
    """TIOCSTI and TIOCLINUX fail on terminals of the sandbox's own, with high bits set as well; others are not there."""
    attempt(INJECTIONS)


@pytest.mark.control
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
