"""What the process engine says that one machine of a family uses by itself."""

from __future__ import annotations

from podflare.engines.base import Usage

MIB = 2**20


def footprint(machine) -> Usage:
    return machine.call(lambda: machine.machine.usage(detail=True))


def test_private_memory_is_what_a_fork_changed(parent, fork):
    """A fresh fork has next to nothing of its parent's 64 MiB by itself, and then as much as it writes to."""
    parent.run("big = bytearray(b'x' * (64 << 20)); pages = range(0, len(big), 4096)")
    before = footprint(parent)
    assert before.private_memory_bytes > 64 * MIB and before.memory_bytes > 60 * MIB
    one, two = fork(parent, 2)
    for machine in (parent, one, two):
        assert footprint(machine).private_memory_bytes < 24 * MIB
    one.run("for page in pages[:8192]: big[page] = 1")
    assert 32 * MIB < footprint(one).private_memory_bytes < 56 * MIB
    assert footprint(two).private_memory_bytes < 24 * MIB
    one.run("del big")
    assert footprint(one).private_memory_bytes < 24 * MIB


def test_changed_files_are_counted_from_the_fork_on(parent, fork):
    """Files written, linked and deleted count in the branch that did it, not in its forks; a new machine has none."""
    assert footprint(parent).changed_files == 0
    parent.run("cd /root; echo 1 > a; ln -s a b; mkdir d; echo 2 > d/c; head -c 1000000 /dev/urandom > big", "bash")
    used = footprint(parent)
    assert used.changed_files == 4 and used.disk_bytes >= 1_000_000
    (child,) = fork(parent)
    assert footprint(child).changed_files == 0
    child.run("rm /root/a; echo 3 >> /root/d/c; echo 4 > /tmp/n", "bash")
    assert footprint(child).changed_files == 3
    assert footprint(parent).changed_files == 4


def test_processes_of_a_machine_are_not_its_forks_ones(parent, fork):
    """Each machine's processes are its own, wherever they hang in the tree of processes."""
    parent.run("import subprocess; sleepers = [subprocess.Popen(['sleep', '1000']) for _ in range(3)]")
    (child,) = fork(parent)
    (grandchild,) = fork(child)
    counts = [footprint(machine).processes for machine in (parent, child, grandchild)]
    # An agent is closed to an ordinary user's daemon and does not count there.
    assert counts in ([5, 2, 2], [4, 1, 1])
    child.run("procs = []\nimport subprocess\nprocs = [subprocess.Popen(['sleep', '1000']) for _ in range(2)]")
    assert footprint(child).processes == counts[1] + 2
    assert [footprint(machine).processes for machine in (parent, grandchild)] == [counts[0], counts[2]]


def test_counting_files_is_bounded_and_follows_no_link(parent):
    """Deep trees end the count, links to the outside lead nowhere, and files without permission count."""
    parent.run(
        "import os\nos.chdir('/root')\nfor _ in range(300):\n    os.mkdir('d'); os.chdir('d')\nopen('deep', 'w')"
    )
    parent.run("cd /root; ln -s / out; ln -s ../../../../.. up; touch closed; chmod 0 closed", "bash")
    assert footprint(parent).changed_files == 3
    parent.run("rm -rf /root/d", "bash")
