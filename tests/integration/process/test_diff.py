"""What engines say two machines have otherwise, and what that costs."""

from __future__ import annotations

import time

import pytest

from podflare.errors import MachineFailed, TooLarge
from podflare.wire.api import Diff

pytestmark = pytest.mark.any_engine
PATHS = ("/root", "/tmp")


def diff(one, other, paths=PATHS, *, detail=False, timeout_s=60) -> Diff:
    return one.call(lambda: one.machine.diff(other.machine, paths, detail=detail, timeout_s=timeout_s))


def lists(found: Diff) -> tuple[list[str], list[str], list[str]]:
    return list(found.added), list(found.removed), list(found.modified)


def test_a_fresh_fork_has_no_differences(parent, fork):
    """Right after a fork parent and children are the same everywhere but in their identity, whatever the parent did."""
    parent.run(
        "cd /root; echo a > f; mkdir -p d/e; ln -s f l; ln f h; mkfifo p; rm -r /srv; rm /etc/shells; chmod 700 /mnt; "
        "rm -r /var/log; mkdir /var/log; echo x > /var/log/n; touch -d @5 f; printf '' > empty",
        "bash",
    )
    one, two = fork(parent, 2)
    for left, right in ((parent, one), (one, parent), (one, two)):
        assert lists(diff(left, right, ("/",))) == ([], [], ["/etc/machine-id"])


def test_every_kind_of_change_is_found(parent, fork):
    """Files, directories, links, modes, deletions, changes of kind: each is in the right list, by its path."""
    parent.run(
        "cd /root; for n in same size bytes mode gone became; do echo aaaa > $n; done; ln -s same link; "
        "mkdir -p dir/sub; echo x > dir/sub/f; mkdir gonedir; echo y > gonedir/g; mkfifo pipe",
        "bash",
    )
    one, two = fork(parent, 2)
    two.run(
        "cd /root; echo aaaaaa > size; echo aaab > bytes; chmod 600 mode; rm gone; rm became; mkdir became; "
        "echo z > became/inside; ln -sfn other link; rm -r gonedir; mkdir newdir; echo n > newdir/n; ln -s x newdir/l; "
        "chmod 700 dir/sub; rm pipe; touch same; echo t > /tmp/t",
        "bash",
    )
    added = ["/root/became/inside", "/root/newdir", "/root/newdir/l", "/root/newdir/n", "/tmp/t"]
    removed = ["/root/gone", "/root/gonedir", "/root/gonedir/g", "/root/pipe"]
    modified = ["/root/became", "/root/bytes", "/root/dir/sub", "/root/link", "/root/mode", "/root/size"]
    for base in (one, parent):
        assert lists(diff(base, two)) == (added, removed, modified)
        assert lists(diff(two, base)) == (removed, added, modified)


def test_what_was_changed_and_changed_back_is_no_difference(parent, fork):
    """A file rewritten with the same bytes, or removed and made again, does not show up."""
    parent.run("cd /root; echo a > f; echo b > g; mkdir d; echo c > d/c", "bash")
    one, two = fork(parent, 2)
    two.run("cd /root; echo a > f; rm g; echo b > g; rm -r d; mkdir d; echo c > d/c", "bash")
    assert lists(diff(one, two)) == ([], [], [])


def test_directories_that_hide_what_was_below(parent, fork):
    """A directory removed and made anew lacks what it held, also what lay in the template or several forks up."""
    parent.run("mkdir /root/d; cd /root/d; echo 1 > a; echo 2 > b", "bash")
    (middle,) = fork(parent)
    middle.run("echo 3 > /root/d/c", "bash")
    one, two = fork(middle, 2)
    two.run("rm -r /root/d; mkdir /root/d; echo 9 > /root/d/new; rm -r /var/log; mkdir /var/log", "bash")
    found = diff(one, two, ("/root", "/var"))
    assert lists(found) == (["/root/d/new"], ["/root/d/a", "/root/d/b", "/root/d/c"], [])
    assert lists(diff(parent, two)) == (["/root/d/new"], ["/root/d/a", "/root/d/b"], [])


def test_relatives_of_any_degree(parent, fork):
    """Cousins, and a grandparent with its grandchild, are compared through all their layers."""
    parent.run("echo 0 > /root/base", "bash")
    one, two = fork(parent, 2)
    one.run("echo 1 > /root/one; rm /root/base", "bash")
    two.run("echo 2 > /root/two", "bash")
    (left,) = fork(one)
    (right,) = fork(two)
    left.run("echo 1 > /root/left", "bash")
    assert lists(diff(left, right)) == (["/root/base", "/root/two"], ["/root/left", "/root/one"], [])
    assert lists(diff(parent, left)) == (["/root/left", "/root/one"], ["/root/base"], [])


def test_strangers_are_compared_above_the_template(new_machine):
    """Two machines that never were one differ by what each wrote, and files of the template do not show up."""
    one, two = new_machine(), new_machine()
    one.run("echo a > /root/both; echo x > /root/mine; echo h > /etc/hosts", "bash")
    two.run("echo a > /root/both; echo y > /root/yours; cp /etc/services /etc/x; mv /etc/x /etc/services", "bash")
    found = diff(one, two, ("/root", "/etc"))
    assert lists(found) == (["/root/yours"], ["/root/mine"], ["/etc/hosts", "/etc/machine-id"])


def test_system_directories_are_compared_where_they_can_be_written(parent, fork):
    """A change below /usr shows up under /usr and under /, and not elsewhere."""
    one, two = fork(parent, 2)
    if "read" in two.run("touch /usr/made 2>&1 || echo read", "bash").stdout:
        assert lists(diff(one, two, ("/usr",))) == ([], [], [])
        pytest.skip("an ordinary user's daemon shows /usr read-only")
    two.run("echo '#!/bin/sh' > /usr/local/bin/tool; rm /usr/bin/env", "bash")
    expected = (["/usr/local/bin/tool", "/usr/made"], ["/usr/bin/env"], [])
    assert lists(diff(one, two, ("/usr",))) == expected
    assert lists(diff(one, two, ("/usr/bin", "/usr/local/bin/tool", "/usr/made"))) == expected
    assert lists(diff(one, two)) == ([], [], [])
    whole = diff(one, two, ("/",))
    assert set(expected[0]) <= set(whole.added) and set(whole.modified) <= {"/etc/machine-id"}


def test_only_the_named_paths_are_compared(parent, fork):
    """Of paths that are files, that do not exist, or lie in one another, each change is told once."""
    one, two = fork(parent, 2)
    two.run("mkdir -p /root/a/b /tmp/c; echo 1 > /root/a/b/f; echo 2 > /root/a/g; echo 3 > /tmp/c/h", "bash")
    assert lists(diff(one, two, ("/root/a/b/f",)))[0] == ["/root/a/b/f"]
    assert lists(diff(one, two, ("/root/a/b", "/root/a/b/f", "/nowhere/x")))[0] == ["/root/a/b", "/root/a/b/f"]
    assert lists(diff(one, two, ("/root/a/g/deeper",))) == ([], [], [])


def test_links_are_never_followed(parent, fork):
    """Links to the outside, upwards and in circles are compared as links, also where a path leads through one."""
    one, two = fork(parent, 2)
    two.run(
        "cd /root; ln -s / root; ln -s ../../../../../.. up; ln -s loop loop; ln -s /machines m; ln -s /tmp t", "bash"
    )
    two.run("echo x > /tmp/x", "bash")
    assert lists(diff(one, two, ("/root",)))[0] == [f"/root/{name}" for name in ("loop", "m", "root", "t", "up")]
    assert lists(diff(one, two, ("/root/t/x", "/root/root/etc"))) == ([], [], [])


def test_names_of_any_bytes(parent, fork):
    """Newlines, quotes, and bytes that are not UTF-8 in names come back as the same bytes."""
    one, two = fork(parent, 2)
    two.run(r"cd /root; touch -- $'new\nline' '\"' $'\xff\xfe' $'\u2028' '-rf' '*'; echo $'\xff' > $'t\x80'", "bash")
    found = diff(one, two, detail=True)
    names = sorted(path.encode("utf-8", "surrogateescape") for path in found.added)
    assert names == sorted(
        b"/root/" + name for name in (b"new\nline", b'\\"', b"\xff\xfe", "\u2028".encode(), b"-rf", b"*", b"t\x80")
    )
    assert set(found.detail) == set(found.added)


def test_detail_tells_sizes_and_patches(parent, fork):
    """With detail each path has its kind and sizes, text its change as a patch, modes theirs; binary files no patch."""
    parent.run(
        "cd /root; printf 'one\\ntwo\\nthree\\n' > text; printf '\\0\\1' > binary; echo s > script; ln -s a l", "bash"
    )
    one, two = fork(parent, 2)
    two.run(
        "cd /root; printf 'one\\n2\\nthree' > text; printf '\\0\\1\\2' > binary; chmod 755 script; ln -sfn b l; "
        "echo new > new; mkdir dir",
        "bash",
    )
    detail = diff(one, two, detail=True).detail
    assert detail["/root/text"].patch == (
        "--- a/root/text\n+++ b/root/text\n@@ -1,3 +1,3 @@\n one\n-two\n-three\n+2\n+three\n\\ No newline at end of file\n"
    )
    assert (detail["/root/text"].size_before, detail["/root/text"].size_after) == (14, 11)
    binary = detail["/root/binary"]
    assert (binary.kind, binary.size_before, binary.size_after, binary.patch) == ("file", 2, 3, None)
    assert detail["/root/script"].patch == "old mode 644\nnew mode 755\n"
    assert "-a\n" in detail["/root/l"].patch and "+b\n" in detail["/root/l"].patch and detail["/root/l"].kind == "link"
    assert detail["/root/new"].patch == "--- /dev/null\n+++ b/root/new\n@@ -0,0 +1 @@\n+new\n"
    assert (detail["/root/new"].size_before, detail["/root/new"].size_after) == (None, 4)
    assert detail["/root/dir"].kind == "directory" and detail["/root/dir"].patch is None


def test_patches_are_bounded(parent, fork):
    """At most 200 patches, none for files above 1 MiB, and text made to be slow to compare costs bounded time."""
    one, two = fork(parent, 2)
    two.run("""
import random
for n in range(300): open(f'/root/f{n:03}', 'w').write('x\\n')
open('/root/big', 'w').write('y' * (1 << 20) + 'z')
""")
    detail = diff(one, two, detail=True).detail
    assert sum(change.patch is not None for change in detail.values()) == 200
    assert detail["/root/big"].patch is None
    slow = "import random\nr = random.Random({seed})\nopen('/root/slow', 'w').write(''.join(r.choice('ab') * r.randrange(1, 60) + '\\n' for _ in range(30000)))"
    one.run(slow.format(seed=1))
    two.run(slow.format(seed=2))
    start = time.monotonic()
    assert "/root/slow" in diff(one, two, ("/root/slow",), detail=True, timeout_s=60).modified
    assert time.monotonic() - start < 45  # alone it takes 2 s; without a bound, many minutes


@pytest.mark.parametrize("make", [
    # 18,000 paths of 3.8 KB
    "for _ in range(15): os.mkdir('n' * 250); os.chdir('n' * 250)\nfor n in range(18_000): os.link('/root/few/f', f'{n}')",
    pytest.param("for n in range(200_001): os.symlink('x', f'{n}')", marks=pytest.mark.soak),
])  # fmt: skip
def test_too_many_differences_are_an_error_of_their_own(parent, fork, make):
    """Beyond the bound of an answer, in paths or bytes, the caller is told to compare less; nothing else is harmed."""
    one, two = fork(parent, 2)
    two.run("import os\nos.mkdir('/root/many'); os.mkdir('/root/few'); open('/root/few/f', 'w').close()")
    assert two.run(f"os.chdir('/root/many')\n{make}").error is None
    with pytest.raises(TooLarge, match="compare fewer"):
        diff(one, two)
    assert lists(diff(one, two, ("/root/few",)))[0] == ["/root/few", "/root/few/f"]


def test_an_order_above_a_packet_is_refused(parent, fork):
    """Paths too long for an order are a clear error; the family lives on."""
    (child,) = fork(parent)
    with pytest.raises(TooLarge, match="paths"):
        diff(parent, child, tuple(f"/root/{n}" + "x" * 2000 for n in range(64)))
    assert lists(diff(parent, child)) == ([], [], [])


def test_deep_directories_are_refused_not_followed_for_ever(parent, fork):
    """A tree deeper than any descriptor table is a clear error, and the next comparison works."""
    one, two = fork(parent, 2)
    two.run("import os\nos.chdir('/root')\nfor _ in range(600):\n    os.mkdir('d'); os.chdir('d')")
    with pytest.raises(MachineFailed, match="nested deeper"):
        diff(one, two)
    assert lists(diff(one, two, ("/tmp",))) == ([], [], [])
    two.run("import os, shutil\nos.chdir('/root')\nimport subprocess; subprocess.run(['rm', '-rf', '/root/d'])")


def test_a_machine_that_changes_meanwhile_costs_no_comparison(parent, fork):
    """While user code turns files into directories and links and back, every comparison answers."""
    one, two = fork(parent, 2)
    two.start("""
import os, shutil, time
ends = time.monotonic() + 1.2
while time.monotonic() < ends:
    for make in (lambda: open('/root/x', 'w').close(), lambda: os.mkdir('/root/x'), lambda: os.symlink('/etc', '/root/x')):
        make()
        os.rmdir('/root/x') if os.path.isdir('/root/x') and not os.path.islink('/root/x') else os.unlink('/root/x')
""")
    ends = time.monotonic() + 0.8
    while time.monotonic() < ends:
        found = diff(one, two, detail=True)
        assert {*found.added} <= {"/root/x"} and not found.removed
    two.finish()


def test_a_closed_machine_is_no_difference(parent, fork):
    """Comparing with a machine that is gone is an error, not a list of removed files."""
    one, two = fork(parent, 2)
    two.close()
    with pytest.raises(MachineFailed):
        diff(one, two)
    assert lists(diff(one, parent)) == ([], [], [])


@pytest.mark.process_engine("in virtual machines all files are listed")
def test_cost_follows_what_changed(parent, fork):
    """Ten changes among 3,000 files that both inherited are found without a look at the others."""
    # Links of one file: cheaper to make than files, and as much to look at.
    parent.run("import os\nopen('/tmp/f', 'w').close()\nfor n in range(3000): os.link('/tmp/f', f'/root/{n}')")
    one, few, many = fork(parent, 3)
    few.run("for n in range(10): os.unlink(f'/root/{n}')")
    many.run("for n in range(3000): os.unlink(f'/root/{n}')")
    took = {}
    for other, count in ((few, 10), (many, 3000)):
        times = []
        for _ in range(9):
            start = time.perf_counter()
            found = diff(one, other)
            times.append(time.perf_counter() - start)
            assert len(found.removed) == count and not found.added and not found.modified
        took[count] = min(times)  # others' work on this machine only adds to it
    assert took[10] < took[3000] / 2, took
