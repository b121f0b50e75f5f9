"""Merges of files when one of the sandboxes, or the computer, is in the way: nothing changes, nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from machines import DrivenMachine
from merges import merge, sh, tree
from podflare.engines.base import EngineOptions, Limits
from podflare.engines.process.engine import ProcessEngine
from podflare.errors import MachineFailed, TooLarge

pytestmark = pytest.mark.any_engine


def helpers(family_pidfd: int) -> list[int]:
    """Pids of the family's own children that are no agents of machines."""
    info = Path(f"/proc/self/fdinfo/{family_pidfd}").read_text()
    family = next(line.split()[1] for line in info.splitlines() if line.startswith("Pid:"))
    inner = os.readlink(f"/proc/{family}/ns/pid_for_children")
    found = []
    for child in Path(f"/proc/{family}/task/{family}/children").read_text().split():
        try:
            if os.readlink(f"/proc/{child}/ns/pid") == inner:
                found.append(int(child))
        except OSError:
            continue
    return found


@pytest.mark.process_engine("virtual machines merge where only they themselves could kill it")
@pytest.mark.parametrize("moment", ["planned", "applied"])
def test_the_merging_process_is_killed(parent, fork, moment):
    """Before it applied, that is an error and nothing has changed; afterwards what it applied stays."""
    one, two = fork(parent, 2)
    sh(two, "echo f > /root/f")

    async def run():
        merging = await one.machine.merge_files(two.machine, ("/root",), timeout_s=20)
        try:
            if moment == "applied":
                await merging.apply({}, timeout_s=20)
            (pid,) = helpers(one.machine.parts.family._pidfd)
            os.kill(pid, signal.SIGKILL)
            if moment == "applied":
                await merging.keep()
            else:
                await merging.apply({}, timeout_s=20)
        finally:
            await merging.aclose()

    if moment == "planned":
        with pytest.raises(MachineFailed):
            one.call(run)
        assert sh(one, "ls -A /root; ls -A / | grep podflare || true") == ""
        assert merge(one, two).merged == ["/root/f"]
    else:
        one.call(run)
        assert sh(one, "cat /root/f") == "f\n" and merge(one, two).merged == []


@pytest.mark.process_engine("it is in the virtual machine, where nobody can look from outside")
def test_the_merging_process_has_next_to_nothing(parent, fork):
    """While it changes files it sees the machine's root alone, with two capabilities, and nobody in there sees it."""
    one, two = fork(parent, 2)
    sh(two, "echo f > /root/f")

    async def run():
        merging = await one.machine.merge_files(two.machine, ("/root",), timeout_s=20)
        try:
            await merging.apply({}, timeout_s=20)
            (pid,) = helpers(one.machine.parts.family._pidfd)
            status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            return status, os.readlink(f"/proc/{pid}/ns/mnt"), os.readlink(f"/proc/{pid}/ns/pid")
        finally:
            await merging.aclose()

    status, mounts, pids = one.call(run)
    assert {int(status[kind], 16) for kind in ("CapPrm", "CapEff")} == {1 << 1 | 1 << 3}  # past modes, as the owner
    assert int(status["CapInh"], 16) == int(status["CapAmb"], 16) == 0
    assert mounts == one.machine.parts.namespaces["mnt"] and pids != one.machine.parts.namespaces["pid"]


@pytest.mark.parametrize("which", ["ours", "theirs"])
def test_a_machine_ends_amid_a_merge(parent, fork, which):
    """The merge fails, the other machine works on, and nothing of either is left once both are closed."""
    one, two = fork(parent, 2)
    sh(two, "echo f > /root/f")

    async def run():
        merging = await one.machine.merge_files(two.machine, ("/root",), timeout_s=20)
        try:
            await (one if which == "ours" else two).machine.aclose()
            await merging.apply({}, timeout_s=20)
        finally:
            await merging.aclose()

    with pytest.raises(MachineFailed, match="gone"):
        parent.call(run)
    assert sh(two if which == "ours" else one, "ls -A / | grep podflare || true") == ""


@pytest.mark.process_engine("a full disk of a virtual machine is one")
def test_more_than_may_be_written(new_machine, fork):
    """Files that would take ours above its disk limit are refused, and ours lives on as it was."""
    one, two = fork(new_machine(Limits(memory_bytes=512 * 2**20, disk_bytes=24 * 2**20, max_processes=64)), 2)
    sh(one, "head -c 14000000 /dev/urandom > /root/a")
    sh(two, "head -c 14000000 /dev/urandom > /root/b")
    with pytest.raises(TooLarge, match="rootfs_gb"):
        merge(one, two)
    assert sh(one, "ls /root") == "a\n"


@pytest.fixture
def small_disk(data_dir, portal) -> Iterator[ProcessEngine]:
    """An engine on a file system of 40 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m,mode=711", "small", data_dir], check=True, timeout=20)

    async def make() -> ProcessEngine:
        made = ProcessEngine(EngineOptions(data_dir=str(data_dir), instance=f"t{data_dir.name}"))
        await made.start()
        return made

    try:
        engine = portal.call(make)
        yield engine
        portal.call(engine.aclose)
        assert os.listdir(data_dir / "machines") == []
    finally:
        subprocess.run(["umount", "--lazy", data_dir], check=True, timeout=20)


@pytest.mark.process_engine("it makes one of its own")
def test_the_disk_is_full(small_disk, portal, fork):
    """If the computer's disk has no room for what is to come, nothing has changed and nothing is left of it."""
    parent = DrivenMachine.create(portal, small_disk)
    one, two = fork(parent, 2)
    sh(two, "head -c 12000000 /dev/urandom > /root/b; echo s > /root/a; rm /etc/services")
    sh(one, "head -c 6000000 /dev/urandom > /root/mine")
    before = tree(one)
    with pytest.raises(MachineFailed, match="No space left"):
        merge(one, two, ("/root", "/etc"))
    assert tree(one) == before and "services" in sh(one, "ls -A / | grep podflare || true; ls /etc")
    sh(one, "rm /root/mine")
    assert merge(one, two, ("/root/a", "/etc")).merged == ["/etc/services", "/root/a"]
    for machine in (one, two, parent):
        machine.close()


def test_holes_stay_holes(parent, fork):
    """A file of almost a gigabyte that holds next to nothing costs next to nothing."""
    one, two = fork(parent, 2)
    sh(two, "truncate -s 900M /root/sparse; printf end | dd of=/root/sparse bs=1 seek=800M conv=notrunc 2>/dev/null")
    assert merge(one, two).merged == ["/root/sparse"]
    size, blocks, end = sh(one, "stat -c '%s %b' /root/sparse; tail -c +838860801 /root/sparse | head -c 3").split()
    assert (size, end) == ("943718400", "end") and int(blocks) < 1000


def test_directories_that_are_too_deep(parent, fork):
    """A tree deeper than is looked at is an error, whoever has it, and changes nothing."""
    one, two = fork(parent, 2)
    two.run("import os\nos.chdir('/root')\nfor _ in range(300):\n    os.mkdir('d'); os.chdir('d')\nos.chdir('/root')")
    with pytest.raises(MachineFailed, match="deeper than 256"):
        merge(one, two)
    assert sh(one, "ls /root; ls -A / | grep podflare || true") == ""
    two.run("import subprocess; subprocess.run(['rm', '-rf', '/root/d'])")


def test_links_lead_nowhere(parent, fork):
    """Where ours has links in the place of directories, nothing is written through them."""
    sh(parent, "mkdir -p /root/d/e; echo 1 > /root/d/e/f")
    one, two = fork(parent, 2)
    sh(two, "echo 2 > /root/d/e/f; echo 3 > /root/d/new; mkdir /root/n; echo 4 > /root/n/n")
    sh(one, "rm -r /root/d; ln -s /etc /root/d; ln -s /var /root/n")
    before = tree(one), sh(one, "find /etc /var | sort | md5sum")
    found = merge(one, two)
    assert sorted(found.conflicts) == ["/root/d", "/root/n"] and not found.merged
    assert (tree(one), sh(one, "find /etc /var | sort | md5sum")) == before
    merge(one, two, decide="theirs")
    assert sh(one, "cd /root; cat d/e/f d/new n/n; find /etc /var | sort | md5sum") == "2\n3\n4\n" + before[1]


def test_what_nobody_may_read_comes_as_well(parent, fork):
    """Modes without permissions are no obstacle, on either side."""
    sh(parent, "mkdir -m 500 /root/locked; install -m 0 /dev/null /root/none")
    one, two = fork(parent, 2)
    sh(two, "chmod 700 /root/locked; echo x > /root/locked/x; chmod 0 /root/locked/x; chmod 500 /root/locked")
    sh(two, "chmod 600 /root/none; echo y > /root/none; chmod 0 /root/none")
    assert merge(one, two).merged == ["/root/locked/x", "/root/none"]
    assert sh(one, "cd /root; stat -c %a locked locked/x none; chmod 600 none; cat none") == "500\n0\n0\ny\n"
    sh(one, "chmod 700 /root/locked")
    sh(two, "chmod 700 /root/locked")
