"""Promise: no process has a capability or gets one, but the REPL two, which open nothing; identities stay as they are."""

from __future__ import annotations

import pytest
from attacking import attempt_without_walls


def test_no_capability_but_the_repls_two(attacker):
    """No process of the sandbox has an effective capability, but the REPL the two that fork needs; no exec passes on any."""
    out = attacker.run("import os; os.system('cat /proc/[0-9]*/status')")
    rows = [line.split() for line in out.stdout.splitlines()]
    for name in ("CapInh:", "CapBnd:", "CapAmb:"):
        assert {row[1] for row in rows if row[0] == name} == {"0000000000000000"}
    effective = [row[1] for row in rows if row[0] == "CapEff:"]
    assert effective.count("0000000000240000") == 1
    assert set(effective) == {"0000000000240000", "0000000000000000"}
    assert "NoNewPrivs:\t0" not in out.stdout
    assert "Seccomp:\t0" not in out.stdout


def _c(name: str, *arguments: str) -> str:
    return f"checked(libc.{name}({', '.join(arguments)})); broke({name!r})"


SYS_ADMIN = {
    "chroot": "os.chroot('/tmp'); broke('chroot')",
    "chroot through the number": "call(161 if X86 else 51, ctypes.c_char_p(b'/tmp')); broke('chroot')",
    "mount a tmpfs": _c("mount", "b'x'", "b'/mnt'", "b'tmpfs'", "0", "None"),
    "umount /proc": _c("umount2", "b'/proc'", "2"),
    "make mounts shared": _c("mount", "None", "b'/'", "None", "1 << 20 | 16384", "None"),
    "sethostname": "socket.sethostname('x'); broke('hostname')",
    "setdomainname": _c("setdomainname", "b'x'", "1"),
    "swapon": "open('/root/s', 'wb').write(bytes(1 << 16)); " + _c("swapon", "b'/root/s'", "0"),
    "swapoff": _c("swapoff", "b'/root/s'"),
    "quotactl": "[call(179 if X86 else 60, n << 8, ctypes.c_char_p(b'/dev/root'), 0, 0) for n in (0x800001, 0x800002, 0x800003)]; broke('quota')",
    "quotactl_fd": "call(443, os.open('/', os.O_RDONLY), 0x80000100, 0, 0); broke('quota')",
    "acct": _c("acct", "b'/root/s'"),
    "unshare with the capability": "checked(libc.unshare(0x20000)); broke('unshare')",
    "trusted attributes": "os.setxattr('/root', 'trusted.x', b'y'); broke('trusted')",
    "overlay's attributes": "os.setxattr('/root', 'trusted.overlay.redirect', b'/'); broke('redirect')",
    "security attributes": "os.setxattr('/root', 'security.ima', b'y'); broke('security')",
    "freeze the file system (FIFREEZE)": "fcntl.ioctl(os.open('/', os.O_RDONLY), 0xC0045877, bytes(4)); broke('frozen')",
    "freeze /dev/shm": "fcntl.ioctl(os.open('/dev/shm', os.O_RDONLY), 0xC0045877, bytes(4)); broke('frozen')",
    "freeze /usr": "fcntl.ioctl(os.open('/usr', os.O_RDONLY), 0xC0045877, bytes(4)); broke('frozen')",
    "trim (FITRIM)": "fcntl.ioctl(os.open('/', os.O_RDONLY), 0xC0185879, bytes(24)); broke('trimmed')",
    "shut the file system down": "fcntl.ioctl(os.open('/usr', os.O_RDONLY), 0x8004587D, bytes(4)); broke('shut down')",
    "take a terminal from its session": """
m, s = os.openpty(); r, w = os.pipe()
if not os.fork(): os.setsid(); fcntl.ioctl(s, 0x540E, 0); os.write(w, b"x"); time.sleep(9)
os.read(r, 1); os.setsid(); fcntl.ioctl(s, 0x540E, 1); broke("terminal")""",
    "redirect the console (TIOCCONS)": "m, s = os.openpty(); fcntl.ioctl(s, 0x541D); broke('console')",
    "poison memory (MADV_HWPOISON)": "page = mmap.mmap(-1, 4096); page[:1] = b'x'; page.madvise(100, 0, 4096); broke('poisoned')",
    "more descriptors in the kernel's log": "call(103 if X86 else 116, 3, ctypes.create_string_buffer(64), 64); broke('log')",
    "reboot": "call(169 if X86 else 142, 0xfee1dead, 672274793, 0, 0); broke('reboot')",
    "lookup_dcookie": "call(212 if X86 else 18, 1, 0, 0); broke('dcookie')",
    "vhangup": "call(153 if X86 else 58); broke('vhangup')",
    "real-time input and output class": "call(251 if X86 else 30, 1, 0, 1 << 13); broke('realtime io')",
    "the name of a mount's parent (statmount)": "call(457, ctypes.create_string_buffer(struct.pack('IIQQQ', 32, 0, 1, 0xff, 0)), ctypes.create_string_buffer(4096), 4096, 0); broke('statmount')",
    "all mounts (listmount)": "call(458, ctypes.create_string_buffer(struct.pack('IIQQQ', 32, 0, 0xffffffffffffffff, 0, 0)), ctypes.create_string_buffer(4096), 512, 0); broke('listmount')",
    "a mount cloned with attributes (open_tree_attr)": "call(467, -100, ctypes.c_char_p(b'/'), 1, 0, 0); broke('open_tree_attr')",
}  # fmt: skip


def test_the_repls_capabilities_open_nothing(attempt):
    """What CAP_SYS_ADMIN and CAP_SYS_CHROOT would allow in the sandbox's user namespace is refused to the REPL, too."""
    attempt(SYS_ADMIN)


GAIN = {
    "raise the permitted set": "call(126 if X86 else 91, ctypes.create_string_buffer(struct.pack('Ii', 0x20080522, 0)), ctypes.create_string_buffer(struct.pack('6I', *[0xffffffff] * 6))); broke('capset')",
    "add CAP_SYS_PTRACE": "call(126 if X86 else 91, ctypes.create_string_buffer(struct.pack('Ii', 0x20080522, 0)), ctypes.create_string_buffer(struct.pack('6I', 1 << 19 | 1 << 18 | 1 << 21, 1 << 19 | 1 << 18 | 1 << 21, 0, 0, 0, 0))); broke('capset')",
    "inheritable from the permitted": """
call(126 if X86 else 91, ctypes.create_string_buffer(struct.pack('Ii', 0x20080522, 0)), ctypes.create_string_buffer(struct.pack('6I', 0x240000, 0x240000, 0x240000, 0, 0, 0)))
checked(libc.prctl(47, 2, 21, 0, 0))
broke(subprocess.run(['cat', '/proc/self/status'], capture_output=True).stdout)""",
    "unlock the secure bits": "checked(libc.prctl(28, 0, 0, 0, 0)); broke('securebits')",
    "keep capabilities": "checked(libc.prctl(8, 1, 0, 0, 0)); broke('keepcaps')",
    "take back no_new_privs": "checked(libc.prctl(38, 0, 0, 0, 0)); broke('no_new_privs')",
    "take back seccomp": "checked(libc.prctl(22, 0, 0, 0, 0)); broke('seccomp')",
    "a filter that allows all": """
class Program(ctypes.Structure): _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]
call(317 if X86 else 277, 1, 0, ctypes.byref(Program(1, struct.pack("HBBI", 6, 0, 0, 0x7fff0000))))
checked(libc.unshare(0x10000000)); broke("unshare")""",
    "listen to the filter of others": """
class Program(ctypes.Structure): _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]
fd = call(317 if X86 else 277, 1, 8, ctypes.byref(Program(1, struct.pack("HBBI", 6, 0, 0, 0x7fc00000))))
if fd >= 0 and "signal" in open("/proc/self/status").read(): broke("a listener")
checked(libc.unshare(0x10000000)); broke("unshare")""",
    "set-user-id program of another user": """
for path in subprocess.run("find / -xdev -perm /6000 -type f 2>/dev/null | head -20", shell=True, capture_output=True, text=True).stdout.split():
    shutil_copy = subprocess.run(["cp", "-p", path, "/root/su"]).returncode
for name in glob.glob("/usr/bin/*"):
    if os.stat(name).st_mode & 0o6000:
        done = subprocess.run(["sh", "-c", f"exec {name} --version & sleep 0.01; grep -h Cap /proc/$!/status"], capture_output=True, text=True)
        if re.search("Cap(Eff|Prm):\\t0*[1-9a-f]", done.stdout): broke(name)
""",
    "own set-user-id program": """
subprocess.run(["cp", "/bin/cat", "/root/sucat"], check=True); os.chmod("/root/sucat", 0o6755)
said = subprocess.run(["/root/sucat", "/proc/self/status"], capture_output=True, text=True).stdout
if "CapEff:\\t0000000000000000" not in said or "NoNewPrivs:\\t1" not in said: broke(said)
""",
    "own file capability": """
subprocess.run(["cp", "/bin/cat", "/root/capcat"], check=True)
os.setxattr("/root/capcat", "security.capability", struct.pack("<5I", 0x02000001, 0xffffffff, 0, 0xffffffff, 0)); broke("file capability")""",
    "file capability for a user namespace": """
open("/root/c", "w").close(); os.setxattr("/root/c", "security.capability", struct.pack("<6I", 0x03000001, 0xffffffff, 0, 0xffffffff, 0, 0)); broke("v3")""",
    "root of the namespace by exec": """
said = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True).stdout
if re.search("Cap(Inh|Prm|Eff|Bnd|Amb):\\t0*[1-9a-f]", said): broke(said)""",
    "higher priority": "os.setpriority(os.PRIO_PROCESS, 0, -20); broke('nice')",
    "real time": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)); broke('fifo')",
    "deadline class": "call(314 if X86 else 274, 0, ctypes.create_string_buffer(struct.pack('IIQiIQQQ', 48, 6, 0, 0, 0, 10**6, 10**7, 10**7)), 0); broke('deadline')",
    "raise a limit": """
import resource
for kind in range(16):
    soft, hard = resource.getrlimit(kind)
    if hard != -1:
        try: resource.setrlimit(kind, (hard, hard + 1))
        except (OSError, ValueError): continue
        broke(kind)
""",
    "be spared by the out-of-memory killer": """os.write(os.open("/proc/self/oom_score_adj", os.O_WRONLY), b"-1"); broke("oom_score_adj")""",
    "move its heap (PR_SET_MM)": "checked(libc.prctl(35, 8, 0x10000, 0, 0)); broke('mm')",
    "a map for its own user namespace": "os.write(os.open('/proc/self/uid_map', os.O_WRONLY), b'0 0 1'); broke('map')",
}  # fmt: skip


def test_no_capability_can_be_gained(attempt):
    """Neither set-user-id programs, file capabilities, exec nor prctl give a capability, a priority or a higher limit."""
    attempt(GAIN)


IDENTITY = {
    name: f"os.{name}({arguments}); broke({name!r})"
    for name, arguments in {
        "setuid": "1", "setgid": "1", "seteuid": "65534", "setegid": "65534", "setreuid": "1, 1", "setresuid": "1, 1, 1", "setregid": "1, 1",
        "setresgid": "1, 1, 1", "setgroups": "[1]", "initgroups": "'root', 7", "chown": "'/root/mine', 1, 1", "lchown": "'/root/mine', -1, 7",
    }.items()
} | {
    "setfsuid": "if libc.setfsuid(1) != libc.setfsuid(1): broke('fsuid')",
    "setfsgid": "if libc.setfsgid(1) != libc.setfsgid(1): broke('fsgid')",
    "credentials of another over a socket": """
a, b = socket.socketpair(); b.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
a.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, struct.pack("3i", os.getpid(), 1, 1))]); broke("posed as user 1")""",
}  # fmt: skip


@pytest.mark.both_engines
def test_identity_cannot_be_changed(attempt):
    """No process gets another user or group id, gives files away, or claims another's id to a peer."""
    attempt(IDENTITY, "open('/root/mine', 'w').close()\n")


@pytest.mark.control
def test_these_attacks_succeed_where_nothing_stops_them():
    """With the same capabilities and no filter most of them come through: they can tell a gain."""
    tried = {
        name: SYS_ADMIN[name]
        for name in (
            "mount a tmpfs", "make mounts shared", "sethostname", "setdomainname", "unshare with the capability", "chroot",
            "all mounts (listmount)",
        )
    }  # fmt: skip
    tried |= {
        name: GAIN[name]
        for name in ("unlock the secure bits", "inheritable from the permitted", "root of the namespace by exec")
    }
    found = attempt_without_walls(tried)
    assert {name: result.split(":")[0] for name, result in found.items()} == dict.fromkeys(tried, "broke")
