"""What is left of a machine, read from the kernel's files, and what that admits."""

from __future__ import annotations

from pathlib import Path

import pytest

from podflare.errors import NoCapacity
from podflare.host.headroom import MIB, Headroom, MemoryGroup, memory_groups

EACH = 32 * MIB


def fake_proc(folder: Path, *, available_mib: int, mounts: str = "", cgroup: str = "") -> Path:
    proc = folder / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: {1000 * 1024} kB\nMemAvailable: {available_mib * 1024} kB\n")
    (proc / "self/mounts").write_text(mounts)
    (proc / "self/cgroup").write_text(cgroup)
    return proc


def test_memory_in_use_decides_not_what_was_granted(tmp_path):
    """A twentieth stays free, and each new sandbox needs its engine's sum above that; the refusal says the figures."""
    headroom = Headroom(tmp_path, disk_reserve=0, proc=fake_proc(tmp_path, available_mib=50 + 3 * 32))
    headroom.admit(3, EACH)
    with pytest.raises(NoCapacity, match=r"no memory for 4 more sandboxes: 146 MiB are left here, 50 are kept free"):
        headroom.admit(4, EACH)
    headroom.admit(1, 96 * MIB)
    headroom.admit(1, 64 * MIB, starting_bytes=EACH)
    with pytest.raises(NoCapacity, match=r", 40 are for those that are starting and each needs 64"):
        headroom.admit(1, 64 * MIB, starting_bytes=40 * MIB)
    Headroom(tmp_path, memory_reserve=0, disk_reserve=0, proc=tmp_path / "proc").admit(1000, EACH)
    with pytest.raises(NoCapacity, match="PODFLARE_MEMORY_RESERVE_MIB"):
        Headroom(tmp_path, memory_reserve=200 * MIB, disk_reserve=0, proc=tmp_path / "proc").admit(1, EACH)


def test_a_full_disk_admits_none(tmp_path):
    """Below its reserve of disk a machine takes no sandbox, nor a snapshot that would go below it, and says so."""
    proc = fake_proc(tmp_path, available_mib=900)
    with pytest.raises(NoCapacity, match=r"no disk for 1 more sandbox: \d+ MiB are left .*PODFLARE_DISK_RESERVE_MIB"):
        Headroom(tmp_path, disk_reserve=1 << 60, proc=proc).admit(1, EACH)
    headroom = Headroom(tmp_path, disk_reserve=MIB, proc=proc)
    headroom.admit_snapshot(1)
    with pytest.raises(NoCapacity, match=r"no disk for a snapshot of about 1099511627776 MiB: \d+ MiB are left"):
        headroom.admit_snapshot(1 << 60)
    Headroom(tmp_path, disk_reserve=0, proc=proc).admit_snapshot(1 << 60)


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_control_groups_count(tmp_path, version):
    """The tightest group above the daemon decides, its cache counted as free; unlimited ones do not."""
    outer = tmp_path / "cg" / "outer"
    inner = outer / "daemon"
    inner.mkdir(parents=True)
    kind = "cgroup2 rw" if version == 2 else "cgroup rw,memory"
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    none = "max" if version == 2 else "9223372036854771712"
    cache = "inactive_file" if version == 2 else "total_inactive_file"
    for group, limit in ((inner, none), (outer, str(300 * MIB))):
        (group / names[0]).write_text(limit + "\n")
        (group / names[1]).write_text(f"{250 * MIB}\n")
        (group / "memory.stat").write_text(f"anon 1\n{cache} {20 * MIB}\n")
    mounts = f"none {tmp_path}/cg {kind} 0 0\n"
    own = "0::/outer/daemon\n" if version == 2 else "4:memory:/outer/daemon\n0::/\n"
    proc = fake_proc(tmp_path, available_mib=900, mounts=mounts, cgroup=own)
    assert memory_groups(proc) == [MemoryGroup(inner, version), MemoryGroup(outer, version)]
    assert MemoryGroup(inner, version).memory() is None
    headroom = Headroom(tmp_path, disk_reserve=0, proc=proc)
    assert headroom.describe()["memory_left_bytes"] == 70 * MIB
    headroom.admit(1, EACH)
    with pytest.raises(NoCapacity, match="70 MiB are left here, 15 are kept free"):
        headroom.admit(2, EACH)


def test_in_a_container_the_mount_is_the_group(tmp_path):
    """A path that is not there below the mount belongs to the outside: then the mount itself counts."""
    top = tmp_path / "cg"
    top.mkdir()
    (top / "memory.limit_in_bytes").write_text("1\n")
    proc = fake_proc(
        tmp_path, available_mib=9, mounts=f"x {top} cgroup rw,memory 0 0\n", cgroup="4:memory:/docker/abc\n"
    )
    assert memory_groups(proc) == [MemoryGroup(top, 1)]


def test_what_the_kernel_does_not_tell_admits(tmp_path):
    """Without the kernel's figures nothing is refused for memory."""
    headroom = Headroom(tmp_path, disk_reserve=0, proc=tmp_path / "nothing")
    assert headroom.memory() is None
    headroom.admit(10_000, EACH)
