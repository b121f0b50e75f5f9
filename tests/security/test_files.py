"""Promise: code in a sandbox reads and writes no file of the host but the template's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.mark.parametrize("path", [
    "/etc/shadow", "/etc/hostname", "/home", "/var/lib", "/run/systemd", "/boot", "/work", "/sys/kernel", "/sys/class",
    "/proc/1/root/etc/shadow", "/proc/1/cwd/etc/shadow", "/proc/self/root/etc/shadow", "/dev/vda", "/dev/sda",
    "/dev/mem", "/dev/kmsg", "/dev/kvm", "/dev/fuse", "/dev/net/tun", "/proc/kcore", "/proc/1/environ", "/proc/1/mem",
    "/proc/1/maps", "/machines", "/lower", "/skel", "/new", "/stage",
])  # fmt: skip
def test_host_path_is_not_there(attacker, path):
    """Nothing readable lies at a path where a host keeps what is not the sandbox's business."""
    out = attacker.run(f"""
import os
path = {path!r}
try:
    print("LEAK", os.listdir(path)[:5]) if os.path.isdir(path) and os.listdir(path) else None
    if not os.path.isdir(path):
        print("LEAK", open(path, "rb").read(64))
except OSError:
    pass
""")
    assert "LEAK b''" in out.stdout or "LEAK" not in out.stdout, out.stdout


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


def test_writes_to_system_directories_stay_private(attacker, new_machine):
    """What one sandbox writes below /usr, /etc or /tmp is seen by neither the host nor another sandbox."""
    attacker.run(
        "for d in /usr/bin /usr/lib /etc /tmp /var/tmp /root /dev/shm; do echo x > $d/planted-4711; done", "bash"
    )
    other = new_machine()
    look = "ls /usr/bin/planted-4711 /usr/lib/planted-4711 /etc/planted-4711 /tmp/planted-4711 /var/tmp/planted-4711 /dev/shm/planted-4711 2>/dev/null"
    assert other.run(look, "bash").stdout == ""
    for folder in ("/usr/bin", "/usr/lib", "/etc", "/tmp", "/var/tmp", "/dev/shm"):
        assert not Path(folder, "planted-4711").exists()
    assert attacker.run("cat /root/planted-4711 /tmp/planted-4711", "bash").stdout == "x\nx\n"


def test_dot_dot_and_links_end_at_the_sandboxs_root(attacker):
    """No number of .. and no link leads above the sandbox's root directory."""
    out = attacker.run("""
import os
root = os.stat("/")
assert os.path.samestat(os.stat("/" + "../" * 64), root)
os.symlink("/../../../../etc", "/tmp/up")
print(sorted(os.listdir("/tmp/up")) == sorted(os.listdir("/etc")), os.path.exists("/etc/shadow"))
""")
    assert out.stdout == "True False\n", out.stderr


def test_no_descriptor_of_the_daemon_is_inherited(attacker):
    """Every descriptor that the REPL and its children hold is the sandbox's own."""
    out = attacker.run("""
import os
for pid in [p for p in os.listdir("/proc") if p.isdigit()]:
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            print(os.readlink(f"/proc/{pid}/fd/{fd}"))
    except OSError:
        pass
""")
    for target in out.stdout.splitlines():
        assert target.startswith(("pipe:", "socket:", "anon_inode:", "/dev/null", "/proc/")), target


def test_a_descriptor_of_a_directory_does_not_lead_out(attacker):
    """fchdir through every open descriptor and then .. finds no directory outside."""
    out = attacker.run("""
import os
found = set()
for fd in range(2000):
    try:
        os.fchdir(fd)
    except OSError:
        continue
    os.chdir("../../../../..")
    found.add(tuple(sorted(os.listdir("."))))
os.chdir("/root")
print(found - {tuple(sorted(os.listdir("/")))})
""")
    assert out.stdout == "set()\n", out.stdout + out.stderr


def test_proc_kernel_settings_are_read_only(attacker):
    """/proc/sys, sysrq and core_pattern cannot be written."""
    out = attacker.run("""
for path in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/sys/kernel/hostname",
             "/proc/sys/vm/drop_caches", "/proc/sys/net/ipv4/ip_forward", "/proc/sys/kernel/modprobe", "/proc/irq/0/smp_affinity"):
    try:
        open(path, "r+").write("1")
        print("WROTE", path)
    except OSError:
        pass
""")
    assert out.stdout == "", out.stdout


def test_dev_has_nothing_but_the_harmless_nodes(attacker):
    """The device directory cannot be added to, and mknod makes no device that opens."""
    out = attacker.run("""
import os, stat
print(sorted(os.listdir("/dev")))
for folder in ("/dev", "/tmp", "/root", "/dev/shm"):
    for kind, numbers in ((stat.S_IFBLK, (254, 0)), (stat.S_IFBLK, (8, 0)), (stat.S_IFCHR, (1, 1)), (stat.S_IFCHR, (10, 232))):
        try:
            os.mknod(f"{folder}/made", kind | 0o666, os.makedev(*numbers))
            open(f"{folder}/made", "rb").read(1)
            print("OPENED", folder, numbers)
        except OSError:
            pass
""")
    assert out.stdout.splitlines() == [
        "['fd', 'full', 'null', 'ptmx', 'pts', 'random', 'shm', 'stderr', 'stdin', 'stdout', 'tty', 'urandom', 'zero']"
    ]


def test_setuid_programs_give_nothing(attacker):
    """A set-user-id program in the tree runs without any capability and without another identity."""
    out = attacker.run("""
import subprocess
subprocess.run("cp /bin/cat /root/sucat; chmod 4755 /root/sucat; /root/sucat /proc/self/status | grep -E 'CapEff|NoNewPrivs'", shell=True)
subprocess.run("find /usr/bin -perm -4000 2>/dev/null | head -1 | xargs -r -I{} sh -c '{} --help >/dev/null 2>&1'; echo done", shell=True)
""")
    assert "CapEff:\t0000000000000000" in out.stdout
    assert "NoNewPrivs:\t1" in out.stdout


def test_hard_link_to_a_system_file_does_not_reach_the_host(attacker):
    """Writing through a hard link to a file of the template changes only the sandbox's copy."""
    before = Path("/usr/lib/os-release").read_bytes()
    attacker.run(
        "ln /usr/lib/os-release /root/l 2>/dev/null; echo hacked >> /root/l; echo hacked >> /usr/lib/os-release", "bash"
    )
    assert Path("/usr/lib/os-release").read_bytes() == before


def test_data_directory_is_closed_to_other_users(engine):
    """What sandboxes write lies in directories that only the daemon and the sandbox can enter."""
    for folder in Path(engine._data, "machines").iterdir():
        assert os.stat(folder).st_mode & 0o077 == 0
