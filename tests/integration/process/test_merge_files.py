"""What engines make of two machines' files when they merge them."""

from __future__ import annotations

import os
import time

import pytest

from merges import merge, sh, tree
from podflare.engines.process.layers import MAX_CHAIN
from podflare.errors import Conflict, MachineFailed

pytestmark = pytest.mark.any_engine


@pytest.mark.both_engines
def test_each_kind_of_change_comes_over(parent, fork):
    """Files, directories, links, FIFOs, modes and deletions of one branch come to the other, to the parent as well."""
    sh(
        parent,
        "cd /root; for n in kept edited mode gone became; do echo $n > $n; done; mkdir -p dir/sub emptied; "
        "echo f > dir/sub/f; echo e > emptied/e; ln -s kept link",
    )
    one, two = fork(parent, 2)
    sh(
        two,
        "cd /root; echo more >> edited; chmod 755 mode; rm gone became; mkdir became; echo i > became/inside; "
        "rm -r emptied; mkdir -p new/deep new/empty; echo n > new/deep/n; ln -sfn edited link; mkfifo -m 640 pipe; "
        "chmod 700 dir/sub; echo t > /tmp/t; echo $'no\\n' > $'odd\\n\\xff name'",
    )
    sh(one, "echo mine > /root/mine")
    found = merge(one, two)
    assert found.applied and not found.conflicts
    assert {"/root/became", "/root/became/inside", "/root/emptied/e", "/root/gone", "/root/new/empty"} <= {
        *found.merged
    }
    sh(two, "echo mine > /root/mine")
    assert tree(one) == tree(two) and sh(one, "cat /tmp/t") == "t\n"
    sh(two, "rm /root/mine")
    assert merge(parent, two).applied and tree(parent) == tree(two)


def test_both_sides_stay(parent, fork):
    """What only ours changed stays, also where theirs has the old state."""
    sh(parent, "cd /root; echo a > a; echo b > b; mkdir d; echo x > d/x; echo y > d/y")
    one, two = fork(parent, 2)
    sh(one, "cd /root; echo A > a; rm d/x; echo new > d/new")
    sh(two, "cd /root; echo B > b; echo Y > d/y")
    found = merge(one, two)
    assert found.merged == ["/root/b", "/root/d/y"]
    assert sh(one, "cd /root; cat a b d/y d/new; ls d") == "A\nB\nY\nnew\nnew\ny\n"


def test_text_is_merged_by_lines(parent, fork):
    """Two branches that changed other lines of one file, and one its mode, end with all of it."""
    sh(parent, "seq 1 20 > /root/list")
    one, two = fork(parent, 2)
    sh(one, "sed -i s/^3$/three/ /root/list")
    sh(two, "sed -i s/^17$/seventeen/ /root/list; chmod 755 /root/list")
    assert merge(one, two).merged == ["/root/list"]
    assert sh(one, "diff <(seq 1 20) /root/list; stat -c %a /root/list") == (
        "3c3\n< 3\n---\n> three\n17c17\n< 17\n---\n> seventeen\n755\n"
    )


CONFLICTS = [
    ("echo 1 > f", "echo 2 > f", "echo 3 > f", "same lines"),
    ("true", "echo 2 > f", "echo 3 > f", "added in both"),
    ("printf '\\0' > f", "printf '\\0a' > f", "printf '\\0b' > f", "no text"),
    ("echo 1 > f", "rm f", "echo 3 > f", "removed here"),
    ("echo 1 > f", "echo 2 > f", "rm f", "removed there"),
    ("echo 1 > f", "chmod 600 f", "chmod 700 f", "mode"),
    ("echo 1 > f", "rm f; mkdir f; echo 2 > f/f", "echo 3 > f", "directory"),
    ("echo 1 > f", "echo 2 > f", "rm f; mkdir f; echo 3 > f/f", "directory"),
    ("mkdir f; echo 1 > f/f", "rm -r f", "echo 3 > f/f", "gone"),
    ("mkdir f; echo 1 > f/f", "echo 2 > f/f", "rm -r f", "gone"),
    ("mkdir f; echo 1 > f/f", "rm -r f; echo 2 > f", "rm -r f; ln -s x f", "directory before"),
    ("mkdir f", "chmod 700 f", "chmod 711 f", "mode"),
    ("ln -s 1 f", "ln -sfn 2 f", "ln -sfn 3 f", "link"),
]


def test_conflicts(parent, fork):
    """What both changed otherwise is a conflict that changes nothing, or is decided for one side, and then is settled."""
    names = [f"/root/c{n}/f" for n in range(len(CONFLICTS))]
    stages = ["; ".join(f"cd /root/c{n}; {case[stage]}" for n, case in enumerate(CONFLICTS)) for stage in range(3)]
    sh(parent, f"mkdir /root/c{{0..{len(CONFLICTS)}}}; {stages[0]}")
    one, two = fork(parent, 2)
    sh(one, f"{stages[1]}; echo own > /root/own")
    sh(two, f"{stages[2]}; echo other > /root/other")
    kept, theirs = tree(one), tree(two)
    found = merge(one, two)
    assert not found.applied and sorted(found.conflicts) == sorted(names)
    for name, (*_, why) in zip(names, CONFLICTS, strict=True):
        assert why in found.conflicts[name].why, (name, found.conflicts[name])
    assert tree(one) == kept and tree(two) == theirs
    (copy,) = fork(one)
    assert merge(one, two, decide="ours").applied
    assert sh(one, "cat /root/other; rm /root/other") == "other\n" and tree(one) == kept
    assert merge(copy, two, decide="theirs").applied
    assert sh(copy, "cat /root/own; rm /root/own") == "own\n" and tree(copy) == theirs
    for settled in (one, copy):
        again = merge(settled, two)
        assert again.applied and not again.merged and not again.conflicts


def test_a_conflict_in_a_text_is_decided_for_its_lines_only(parent, fork):
    """Taking theirs in a conflict keeps the lines that only ours changed, elsewhere in the file."""
    sh(parent, "seq 1 9 > /root/f")
    one, two = fork(parent, 2)
    sh(one, "sed -i 's/^1$/one/; s/^9$/nine/' /root/f")
    sh(two, "sed -i 's/^1$/eins/; s/^5$/fuenf/' /root/f")
    merge(one, two, decide="theirs")
    assert sh(one, "cat /root/f").split() == ["eins", "2", "3", "4", "fuenf", "6", "7", "8", "nine"]


def test_merging_goes_on_from_the_latest_merge(parent, fork):
    """A second merge brings what came since, by lines too, in both directions, for forks of both as well."""
    sh(parent, "seq 1 20 > /root/list")
    one, two = fork(parent, 2)
    sh(one, "sed -i s/^1$/one/ /root/list")
    sh(two, "sed -i s/^20$/twenty/ /root/list; echo x > /root/x")
    assert merge(one, two).merged == ["/root/list", "/root/x"]
    assert merge(one, two).merged == []
    sh(one, "rm /root/x")
    (three,) = fork(one)
    sh(two, "sed -i s/^twenty$/zwanzig/ /root/list")
    for other in (one, three):
        assert merge(other, two).merged == ["/root/list"]
        assert sh(other, "ls /root; head -n1 /root/list; tail -n1 /root/list") == "list\none\nzwanzig\n"
    assert merge(two, one).merged == ["/root/list", "/root/x"]
    assert tree(two) == tree(one)


def test_the_base_of_relatives(parent, fork):
    """Cousins and forks made at different times of one parent have the latest state of which both come as their base."""
    (early,) = fork(parent)
    sh(parent, "echo p > /root/p; echo q > /root/q")
    (late,) = fork(parent)
    (grandchild,) = fork(late)
    sh(grandchild, "rm /root/p; echo g > /root/g")
    sh(early, "echo e > /root/e")
    assert merge(grandchild, early).merged == ["/root/e"] and sh(grandchild, "ls /root") == "e\ng\nq\n"
    assert merge(early, late).merged == ["/root/p", "/root/q"]
    assert merge(parent, grandchild).merged == ["/root/e", "/root/g", "/root/p"]
    assert merge(late, grandchild).merged == ["/root/e", "/root/g", "/root/p"]


@pytest.mark.process_engine("of virtual machines a fork's whole state is kept")
def test_the_base_outlives_layers_that_became_one(parent, fork, engine):
    """Two lines of more generations than are stacked still know what both were, and let go of it with their ends."""
    before = set(os.listdir(engine._machines_dir))
    sh(parent, "seq 1 20 > /root/list; echo p > /root/p")
    lines = fork(parent, 2)
    sh(lines[0], "sed -i s/^3$/three/ /root/list")
    sh(lines[1], "sed -i s/^17$/seventeen/ /root/list; rm /root/p")
    for _ in range(MAX_CHAIN + 1):
        for side in (0, 1):
            (child,) = fork(lines[side])
            lines[side].close()
            lines[side] = child
    one, two = lines
    sh(one, "echo o > /root/o")
    assert len(one.machine.parts.layers) < MAX_CHAIN
    assert merge(one, two).merged == ["/root/list", "/root/p"]
    assert sh(one, "ls /root; sed -n '3p;17p' /root/list") == "list\no\nthree\nseventeen\n"
    assert merge(parent, one).merged == ["/root/list", "/root/o", "/root/p"]
    for machine in (one, two, parent):
        machine.close()
    assert set(os.listdir(engine._machines_dir)) <= before


def test_strangers_have_the_template_as_their_base(new_machine):
    """Of two machines that never were one each has added all that it wrote."""
    one, two = new_machine(), new_machine()
    sh(one, "echo same > /root/s; echo 1 > /root/f; echo h > /root/h")
    sh(two, "echo same > /root/s; echo 2 > /root/f; echo k > /root/k; echo 9 >> /etc/services")
    found = merge(one, two, ("/",), decide="theirs")
    assert list(found.conflicts) == ["/root/f"] and "/root/k" in found.merged and "/etc/machine-id" not in found.merged
    assert sh(one, "cat /root/f /root/h /root/k; tail -n1 /etc/services") == "2\nh\nk\n9\n"


def test_only_named_paths_come(parent, fork):
    """Of the other's changes those below the given paths come, with the directories that they need."""
    one, two = fork(parent, 2)
    sh(two, "mkdir -p /root/a/b; echo f > /root/a/b/f; echo g > /root/a/g; echo h > /root/h")
    assert merge(one, two, ("/root/a/b/f",)).merged == ["/root/a/b/f"]
    assert sh(one, "cd /root; find . -type f ! -name .bashrc") == "./a/b/f\n"
    assert merge(one, two).merged == ["/root/a/g", "/root/h"]
    sh(two, "rm -r /root/a")
    assert merge(one, two, ("/root/a/b/f",)).merged == ["/root/a/b/f"]
    assert sh(one, "cd /root; find a | sort") == "a\na/b\na/g\n"


def test_a_parent_that_is_no_directory_here_is_a_conflict(parent, fork):
    """A named path whose parent is a file in ours comes only if that is decided."""
    one, two = fork(parent, 2)
    sh(two, "mkdir /root/a; echo f > /root/a/f")
    sh(one, "echo file > /root/a")
    assert list(merge(one, two, ("/root/a/f",)).conflicts) == ["/root/a/f"]
    merge(one, two, ("/root/a/f",), decide="theirs")
    assert sh(one, "cat /root/a/f") == "f\n"


def test_what_was_not_kept_is_undone(parent, fork):
    """A merge that is applied and given up leaves everything as it was, whatever was removed, replaced, made."""
    sh(parent, "cd /root; mkdir -p d/e; echo x > d/x; echo f > f; ln -s f l; echo m > m; chmod 711 d/e")
    one, two = fork(parent, 2)
    sh(
        two,
        "cd /root; rm -r d; echo d > d; echo F > f; rm l; chmod 600 m; mkdir -p n/o; echo p > n/o/p; rm /etc/passwd",
    )
    before = tree(one)
    merge(one, two, ("/root", "/etc"), keep=False)
    assert tree(one) == before and sh(one, "ls -A / | grep podflare || true; wc -l < /etc/passwd") != "0\n"
    assert merge(one, two).applied and tree(one) == tree(two)


def test_open_files_keep_their_content(parent, fork):
    """A file that is replaced while ours has it open keeps the old content there; the name has the new one."""
    parent.run("open('/root/f', 'w').write('old'); held = open('/root/f')")
    one, two = fork(parent, 2)
    two.run("open('/root/f', 'w').write('new')")
    merge(one, two)
    assert one.run("print(held.read(), open('/root/f').read())").stdout == "old new\n"


def test_installed_packages_come_where_they_can_be_written(parent, fork):
    """Below /usr, where it can be written, files are merged when asked for by path."""
    one, two = fork(parent, 2)
    if "read" in two.run("touch /usr/made 2>&1 || echo read", "bash").stdout:
        pytest.skip("an ordinary user's daemon shows /usr read-only")
    sh(two, "echo '#!/bin/sh' > /usr/local/bin/tool; chmod 755 /usr/local/bin/tool; rm /usr/bin/env")
    assert merge(one, two).merged == []
    found = merge(one, two, ("/usr",))
    assert found.merged == ["/usr/bin/env", "/usr/local/bin/tool", "/usr/made"]
    assert (
        sh(one, "ls /usr/bin/env /usr/made /usr/local/bin/tool 2>/dev/null || true")
        == "/usr/local/bin/tool\n/usr/made\n"
    )


def test_what_cannot_be_anothers_is_told(parent, fork):
    """Sockets stay where they are, and are told, also within a directory that comes."""
    one, two = fork(parent, 2)
    two.run(
        "import os, socket; os.mkdir('/root/d'); open('/root/d/f', 'w').close()\n"
        "a, b = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX); a.bind('/root/s'); b.bind('/root/d/t')"
    )
    found = merge(one, two)
    assert found.skipped == [("/root/d/t", "socket"), ("/root/s", "socket")]
    assert found.merged == ["/root/d", "/root/d/f"] and sh(one, "ls /root/d") == "f\n"


def test_bytecode_never_conflicts(parent, fork):
    """Both branches' own bytecode of one module is no conflict."""
    one, two = fork(parent, 2)
    for branch in (one, two):
        sh(branch, "mkdir /root/__pycache__; head -c 100 /dev/urandom > /root/__pycache__/m.pyc")
    assert merge(one, two).applied


def test_machines_that_are_gone(parent, fork):
    """Merging with a closed machine is an error that changes nothing."""
    one, two = fork(parent, 2)
    two.close()
    with pytest.raises(Exception, match="gone"):
        merge(one, two)


RACER = """
import os, time
while True:
    for make in (lambda: os.mkdir('/root/3'), lambda: os.symlink('/etc', '/root/3'), lambda: open('/root/3', 'w').close(),
                 lambda: os.symlink('/etc', '/root/d'), lambda: os.rename('/root/d', '/root/e')):
        try: make()
        except OSError: pass
        for name in ('/root/3', '/root/d', '/root/e/d', '/root/e'):
            try: os.rmdir(name) if os.path.isdir(name) and not os.path.islink(name) else os.unlink(name)
            except OSError: pass
"""


def test_running_code_in_the_way(parent, fork):
    """While ours changes the same names all the time, each merge answers; nothing leads outside or is left behind."""
    one, two = fork(parent, 2)
    sh(two, "cd /root; for n in 1 2 3 4 5; do echo $n > $n; done; mkdir d; echo d > d/d")
    one.run(f"import subprocess, sys; racer = subprocess.Popen([sys.executable, '-c', {RACER!r}])")
    outcomes = []
    ends = time.monotonic() + 1.5
    while time.monotonic() < ends or len(outcomes) <= 3:
        try:
            outcomes.append("conflict" if merge(one, two, keep=False).conflicts else "undone")
        except (Conflict, MachineFailed) as exc:
            outcomes.append("refused")
            assert isinstance(exc, Conflict) or "not all be undone" in str(exc)
    one.run("racer.kill(); racer.wait()")
    assert sh(one, "cd /root; rm -rf 3 d e .bashrc; ls -A; ls /etc/d /etc/3 2>/dev/null || true") == ""
    assert sh(two, "cd /root; cat 1 2 3 4 5 d/d") == "1\n2\n3\n4\n5\nd\n"
