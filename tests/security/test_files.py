"""Promise: code in a sandbox reads and writes no file of the host but the template's."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import pytest
from attacking import FAULTY, HELD, attempt_in, attempt_without_walls

HOST_PATHS = """
/etc/shadow /etc/gshadow /etc/sudoers /etc/hostname /etc/ssh /etc/crontab /etc/fstab /home /var/lib /var/log /var/spool /run/systemd
/run/docker.sock /run/containerd /boot /work /opt /srv /mnt /media /sys/kernel /sys/class /sys/fs/cgroup /sys/firmware
/proc/1/root/etc/shadow /proc/1/cwd/etc/shadow /proc/self/root/etc/shadow /proc/thread-self/root/etc/shadow
/dev/vda /dev/sda /dev/mem /dev/port /dev/kmsg /dev/kvm /dev/fuse /dev/net/tun /dev/loop0 /dev/loop-control /dev/userfaultfd
/dev/snapshot /dev/mapper/control /dev/cpu/0/msr /proc/kcore /proc/keys /proc/timer_list /proc/sched_debug
/proc/kpageflags /proc/kpagecount /proc/1/environ /proc/1/mem /proc/1/maps /proc/1/stack /machines /lower /skel /new /stage /empty
""".split()


def test_nothing_of_the_host_lies_at_its_paths(attempt, engine):
    """Nothing readable lies where a host keeps what is not the sandbox's business, nor where this daemon keeps its data."""
    look = """
def look(path):
    if os.path.isdir(path):
        if os.listdir(path): broke(os.listdir(path)[:5])
    else:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if data := file.read(64): broke(data)
"""
    paths = {*HOST_PATHS, engine._data, f"{engine._data}/machines", str(Path(__file__).parents[2]), os.getcwd()}
    attempt({path: f"look({path!r})" for path in sorted(map(str, paths))}, look)


DOORS = {
    f"/proc/*/{name}": f"""
for path in glob.glob("/proc/[0-9]*/{name}") + glob.glob("/proc/[0-9]*/task/*/{name}"):
    try: status = os.stat(path)
    except OSError: continue
    if stat.S_ISDIR(status.st_mode) and not os.path.samestat(os.stat(path + "/" + "../" * 64), os.stat("/")): broke(path)
    if os.path.isdir(path) and os.path.exists(path + "/etc/shadow"): broke(path)
"""
    for name in ("root", "cwd", "fd/*", "map_files/*", "exe")
}
DOORS |= {
    "many ..": """if not os.path.samestat(os.stat("/" + "../" * 200), os.stat("/")): broke("..")""",
    "fchdir to each descriptor": """
for fd in range(2000):
    try: os.fchdir(fd)
    except OSError: continue
    os.chdir("../" * 40)
    if not os.path.samestat(os.stat("."), os.stat("/")): broke(fd)
""",
    "each descriptor as a directory": """
for fd in range(2000):
    try: found = os.stat("../" * 40, dir_fd=fd)
    except OSError: continue
    if not os.path.samestat(found, os.stat("/")): broke(fd)
""",
    "openat2 past the root": """
fd = call(437, os.open("/", os.O_PATH), ctypes.c_char_p(b"../../../etc/shadow"), ctypes.byref((ctypes.c_uint64 * 3)(0, 0, 0)), 24)
broke(os.read(fd, 9))""",
    "a directory moved away under the feet": """
os.makedirs("/root/a/b/c"); os.chdir("/root/a/b/c"); os.rename("/root/a/b", "/tmp/b"); os.chdir("../" * 40)
if not os.path.samestat(os.stat("."), os.stat("/")): broke(os.getcwd())
""",
    "a directory removed under the feet": """
os.makedirs("/root/gone"); os.chdir("/root/gone"); os.rmdir("/root/gone"); os.chdir("../" * 40)
if not os.path.samestat(os.stat("."), os.stat("/")): broke("..")
""",
    "up from a mount": """
for mount in ("/proc", "/dev", "/dev/shm", "/dev/pts", "/usr", "/proc/sys"):
    if not os.path.samestat(os.stat(mount + "/../.." + "/.." * 9), os.stat("/")): broke(mount)
""",
    "an absolute link": """
os.symlink("/../../../../etc/shadow", "/tmp/up"); opens("/tmp/up")""",
    "a link of /proc to itself": """
opens("/proc/self/root/proc/1/root/etc/shadow")""",
    "a handle of the root's inode (open_by_handle_at)": """
class Handle(ctypes.Structure): _fields_ = [("bytes", ctypes.c_uint), ("type", ctypes.c_int), ("data", ctypes.c_ubyte * 8)]
for inode in (2, 64, 128, 256):
    handle = Handle(8, 1, (ctypes.c_ubyte * 8)(*struct.pack("II", inode, 0)))
    try: broke(os.listdir(call(304 if X86 else 265, os.open("/usr", os.O_RDONLY), ctypes.byref(handle), 0)))
    except OSError: pass
""",
    "a handle of a file (name_to_handle_at)": """
call(303 if X86 else 264, -100, ctypes.c_char_p(b"/usr"), ctypes.create_string_buffer(struct.pack("Ii", 128, 0) + bytes(128)), ctypes.byref(ctypes.c_int()), 0)
broke("a handle")""",
    "chroot and back out": """
os.mkdir("/tmp/jail"); outside = os.open("/", os.O_RDONLY); os.chroot("/tmp/jail"); os.fchdir(outside); broke(os.listdir("."))""",
    "pivot_root": """call(155 if X86 else 41, ctypes.c_char_p(b"."), ctypes.c_char_p(b".")); broke("pivot_root")""",
    "a descriptor that was never given": """
names = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]
strange = [name for name in names if not name.startswith(("pipe:", "socket:", "anon_inode:", "/dev/null", "/proc/"))]
if strange: broke(strange)
""",
}


def test_no_door_leads_out(attempt):
    """No link of /proc, descriptor, .., handle or link leads above the sandbox's root directory."""
    attempt(DOORS)


DEVICES = {
    f"{kind} {major}:{minor} in {folder}": f"""
os.mknod("{folder}/made", stat.S_IF{kind} | 0o666, os.makedev({major}, {minor})); opens("{folder}/made", os.O_RDWR)"""
    for folder in ("/tmp", "/root", "/dev", "/dev/shm", "/usr")
    for kind, major, minor in (
        ("BLK", 254, 0), ("BLK", 8, 0), ("BLK", 259, 0), ("BLK", 7, 0), ("CHR", 1, 1), ("CHR", 1, 4), ("CHR", 1, 11),
        ("CHR", 10, 232), ("CHR", 10, 229), ("CHR", 10, 200), ("CHR", 5, 1), ("CHR", 4, 0), ("CHR", 1, 3),
    )
}  # fmt: skip


@pytest.mark.any_engine
def test_no_device_can_be_made(attempt):
    """mknod makes no device that opens, in whatever file system of the sandbox."""
    attempt(DEVICES)


@pytest.mark.any_engine
@pytest.mark.control
def test_dev_has_nothing_but_the_harmless_nodes(attacker):
    """The device directory holds six devices without power, and links."""
    out = attacker.run("import os; print(*sorted(os.listdir('/dev')))")
    assert out.stdout == "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero\n"


KERNEL_FILES = """
/proc/sys/kernel/core_pattern /proc/sys/kernel/hostname /proc/sys/kernel/modprobe /proc/sys/kernel/poweroff_cmd /proc/sys/kernel/panic
/proc/sys/kernel/ns_last_pid /proc/sys/kernel/randomize_va_space /proc/sys/kernel/yama/ptrace_scope /proc/sys/kernel/unprivileged_bpf_disabled
/proc/sys/kernel/shmmax /proc/sys/kernel/sysrq /proc/sys/kernel/domainname /proc/sys/kernel/keys/maxkeys /proc/sys/vm/drop_caches
/proc/sys/vm/overcommit_memory /proc/sys/vm/panic_on_oom /proc/sys/fs/suid_dumpable /proc/sys/fs/file-max /proc/sys/fs/protected_symlinks
/proc/sys/fs/binfmt_misc/register /proc/sys/net/ipv4/ip_forward /proc/sys/net/core/somaxconn /proc/sys/net/ipv4/ping_group_range
/proc/sys/user/max_user_namespaces /proc/sysrq-trigger /proc/irq/0/smp_affinity /proc/irq/default_smp_affinity /proc/bus/pci/devices
/proc/fs/ext4 /proc/acpi/wakeup /proc/scsi/scsi /proc/mtrr /proc/1/oom_score_adj /proc/1/attr/current /proc/1/uid_map /proc/1/setgroups
/proc/1/clear_refs /proc/1/coredump_filter /proc/1/comm /proc/1/autogroup /proc/1/timerslack_ns /proc/1/mem /proc/self/uid_map
/proc/self/gid_map /proc/self/projid_map /proc/self/setgroups /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/release_agent /sys/power/state
/sys/kernel/uevent_helper /sys/kernel/security /sys/kernel/debug /sys/kernel/mm/transparent_hugepage/enabled /proc/dynamic_debug/control
""".split()


@pytest.mark.any_engine
def test_the_kernels_settings_cannot_be_written(attempt, engine_name):
    """Nothing in /proc and /sys that acts on the kernel, or on the sandbox's first process, can be opened for writing."""
    write = "def write(path): os.write(os.open(path, os.O_WRONLY), b'1'); broke('wrote')\n"
    # In a virtual machine code may end its agent, and with it its own machine.
    left_out = "/proc/1/" if engine_name == "microvm" else "-"
    attempt({path: f"write({path!r})" for path in KERNEL_FILES if not path.startswith(left_out)}, write)


REMOUNTS = {
    "a cgroup file system of its own": "checked(libc.mount(b'c', b'/mnt', b'cgroup2', 0, None)); broke('cgroup2')",
    "cgroup v1 with a release agent": "checked(libc.mount(b'c', b'/mnt', b'cgroup', 0, b'none,name=x')); broke('cgroup')",
    "sysfs": "checked(libc.mount(b's', b'/mnt', b'sysfs', 0, None)); broke('sysfs')",
    "a fresh /proc": "checked(libc.mount(b'p', b'/mnt', b'proc', 0, None)); broke('proc')",
    "/proc/sys made writable": "checked(libc.mount(None, b'/proc/sys', None, 32 | 4096, None)); broke('remount')",
    "the masks taken off": "checked(libc.umount2(b'/proc/kcore', 2)); broke('umount')",
    "a bind of the root": "checked(libc.mount(b'/', b'/mnt', None, 4096 | 16384, None)); broke('bind')",
    "an overlay below the system": "checked(libc.mount(b'o', b'/mnt', b'overlay', 0, b'lowerdir=/usr:/etc')); broke('overlay')",
    "debugfs, tracefs, bpf, binfmt, mqueue": """
for kind in (b"debugfs", b"tracefs", b"bpf", b"binfmt_misc", b"mqueue", b"devpts", b"tmpfs", b"ramfs", b"securityfs", b"fuse"):
    if libc.mount(b"x", b"/mnt", kind, 0, b"") == 0: broke(kind)
""",
}


@pytest.mark.both_engines
def test_no_file_system_can_be_mounted(attempt):
    """Neither cgroup, sysfs and proc file systems nor binds and remounts can be had from inside."""
    attempt(REMOUNTS)


@pytest.mark.both_engines
def test_a_secret_of_the_host_is_found_nowhere(attacker, private_temp):
    """A file that the host makes in its temporary directory is not visible under any path that the sandbox can list."""
    secret = private_temp / "secret-host-file-4711"
    secret.write_text("secret")
    secret.chmod(0o666)
    try:
        out = attacker.run("find / -xdev -name 'secret-host-file-*' 2>/dev/null; ls /tmp", language="bash")
    finally:
        secret.unlink()
    assert out.stdout.strip() == ""


@pytest.mark.any_engine
def test_writes_to_system_directories_stay_private(attacker, new_machine):
    """What one sandbox writes below /usr, /etc or /tmp is seen by neither the host nor another sandbox."""
    folders = ("/usr/bin", "/usr/lib", "/usr", "/etc", "/tmp", "/var/tmp", "/dev/shm", "/")
    attacker.run(f"for d in {' '.join(folders)} /root; do echo x > $d/planted-4711; done", "bash")
    other = new_machine()
    assert other.run(f"for d in {' '.join(folders)} /root; do ls $d | grep planted; done", "bash").stdout == ""
    assert not [folder for folder in folders if Path(folder, "planted-4711").exists()]
    assert attacker.run("cat /root/planted-4711 /tmp/planted-4711", "bash").stdout == "x\nx\n"


OVERWRITE = {
    "shared mapping": "mmap.mmap(os.open(path, os.O_RDWR), 6)[:6] = b'hacked'",
    "private mapping made shared": "page = mmap.mmap(os.open(path, os.O_RDONLY), 6, flags=mmap.MAP_SHARED, prot=1); start = next(int(line.split('-')[0], 16) for line in open('/proc/self/maps') if line.rstrip().endswith(path)); checked(libc.mprotect(ctypes.c_void_p(start), 4096, 3)); ctypes.memmove(start, b'hacked', 6)",
    "own memory written through /proc": """
fd = os.open(path, os.O_RDONLY); page = mmap.mmap(fd, 6, flags=mmap.MAP_SHARED, prot=1)
start = next(int(line.split('-')[0], 16) for line in open('/proc/self/maps') if line.rstrip().endswith(path))
os.pwrite(os.open('/proc/self/mem', os.O_RDWR), b'hacked', start)""",
    "append": "open(path, 'ab').write(b'hacked')",
    "truncate": "os.truncate(path, 0)",
    "replace": "open('/root/new', 'w').write('hacked'); os.rename('/root/new', path)",
    "hard link": "os.link(path, '/root/l'); open('/root/l', 'ab').write(b'hacked')",
    "hard link through a descriptor": "fd = os.open(path, os.O_RDONLY); os.link(f'/proc/self/fd/{fd}', '/root/m', follow_symlinks=True); open('/root/m', 'ab').write(b'hacked')",
    "descriptor opened anew": "fd = os.open(path, os.O_RDONLY); open(f'/proc/self/fd/{fd}', 'r+b').write(b'hacked')",
    "splice into its page cache": """
r, w = os.pipe(); fd = os.open(path, os.O_RDONLY); os.splice(fd, w, 1, offset_src=0); os.write(w, b'hacked')""",
    "modes and times": "os.chmod(path, 0o4777); os.utime(path, (1, 1)); os.chown(path, 0, 0)",
    "attributes": "os.setxattr(path, 'user.x', b'y')",
    "immutable": "fcntl.ioctl(os.open(path, os.O_RDONLY), 0x40086602, struct.pack('l', 0x10))",
    "hole": "call(285 if X86 else 47, os.open(path, os.O_RDWR), 3, 0, 4096)",
    "clone over it": "fcntl.ioctl(os.open(path, os.O_RDWR), 0x40049409, os.open('/root', os.O_RDONLY))",
    "the running interpreter (/proc/self/exe)": "open('/proc/self/exe', 'r+b').write(b'hacked')",
    "the agent's program (/proc/1/exe)": "open('/proc/1/exe', 'r+b').write(b'hacked')",
    "the loader": "open(os.path.realpath('/lib64/ld-linux-x86-64.so.2'), 'ab').write(b'hacked')",
}


def test_system_files_stay_as_they_are(attacker, record):
    """No way of writing to the template's programs, libraries and files changes those of the host, or their status."""
    victims = [Path("/usr/lib/os-release"), Path(sys.executable).resolve()]
    victims += [path for path in [Path("/lib64/ld-linux-x86-64.so.2").resolve()] if path.exists()]
    known = {path: _fingerprint(path) for path in victims}
    found = attempt_in(attacker, OVERWRITE, "path = '/usr/lib/os-release'\n")
    assert not {name: result for name, result in found.items() if result.startswith(FAULTY)}
    changed = [str(path) for path in victims if _fingerprint(path) != known[path]]
    record(dict.fromkeys(found, f"broke: {changed}" if changed else HELD))


def _fingerprint(path: Path) -> tuple[object, ...]:
    status = path.stat()
    return (
        hashlib.sha256(path.read_bytes()).hexdigest(), status.st_mode, status.st_mtime_ns, status.st_uid, status.st_nlink,
        os.listxattr(path),
    )  # fmt: skip


@pytest.mark.both_engines
def test_data_directory_is_closed_to_other_users(engine, attacker):
    """What sandboxes write lies in directories that only the daemon and the sandbox can enter."""
    folders = list(Path(engine._data, "machines").iterdir())
    assert folders and all(os.stat(folder).st_mode & 0o077 == 0 for folder in folders)


@pytest.mark.control
def test_these_attacks_succeed_where_nothing_stops_them():
    """Without walls most doors are open: the attacks can tell a leak."""
    tried = {
        "a file of the host": "opens('/etc/passwd')",
        "a descriptor of a directory": "os.dup2(os.open('/usr', os.O_RDONLY), 900)\n" + DOORS["a descriptor that was never given"],
        "chroot and back out": DOORS["chroot and back out"].replace('os.mkdir("/tmp/jail")', "0").replace("/tmp/jail", "/usr"),
        "a bind of the root": REMOUNTS["a bind of the root"],
        "debugfs, tracefs, bpf, binfmt, mqueue": REMOUNTS["debugfs, tracefs, bpf, binfmt, mqueue"],
        "an overlay below the system": REMOUNTS["an overlay below the system"],
    }  # fmt: skip
    assert {name: result.split(":")[0] for name, result in attempt_without_walls(tried).items()} == dict.fromkeys(
        tried, "broke"
    )
