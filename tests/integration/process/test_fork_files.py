"""A fork is a snapshot of the REPL: files, descriptors, shared memory."""

from __future__ import annotations

import pytest

# A machine that lies too deep to be forked is copied into a new one, which must make no difference.
pytestmark = [pytest.mark.any_engine, pytest.mark.parametrize("way", ["forked", "carried"])]


def test_files_are_there_and_independent(parent, fork):
    """Children see the parent's files; writes, deletions and new directories stay in their branch."""
    parent.run(
        "mkdir -p /root/d/e; echo a > /root/d/f; echo b > /root/d/g; ln -s f /root/d/l; ln /root/d/f /root/d/h; echo x > /etc/made",
        "bash",
    )
    one, two = fork(parent, 2)
    assert (
        one.run(
            "cat /root/d/f /root/d/l /etc/made; readlink /root/d/l; echo one > /root/d/f; rm /root/d/g; mkdir /root/d/n",
            "bash",
        ).stdout
        == "a\na\nx\nf\n"
    )
    assert two.run("cat /root/d/f /root/d/g; ls /root/d", "bash").stdout == "a\nb\ne\nf\ng\nh\nl\n"
    assert parent.run("cat /root/d/f /root/d/g; ls /root/d", "bash").stdout == "a\nb\ne\nf\ng\nh\nl\n"
    assert one.run("ls /root/d; cat /root/d/f", "bash").stdout == "e\nf\nh\nl\nn\none\n"


def test_deletions_and_replaced_directories_cross(parent, fork):
    """What the parent deleted of the template, or replaced by another kind of thing, is so in the child."""
    parent.run(
        "rm /etc/shells; rm -r /var/log; mkdir /var/log; echo n > /var/log/new; rm -r /srv; echo file > /srv", "bash"
    )
    (child,) = fork(parent)
    look = "ls /etc/shells 2>&1 | grep -c 'No such'; ls /var/log; cat /srv"
    assert child.run(look, "bash").stdout == "1\nnew\nfile\n"
    (grandchild,) = fork(child)
    assert grandchild.run(look, "bash").stdout == "1\nnew\nfile\n"


def test_attributes_cross(parent, fork):
    """Mode, times and extended attributes of files and directories are kept."""
    parent.run(
        "cd /root; echo a > f; chmod 640 f; touch -d @1000000000 f; mkdir -m 1777 d; mkfifo p; chmod 700 /srv", "bash"
    )
    parent.run("import os; os.setxattr('/root/f', 'user.note', b'hi')")
    (child,) = fork(parent)
    assert (
        child.run("cd /root; stat -c '%a %Y' f; stat -c %a d /srv; stat -c %F p", "bash").stdout
        == "640 1000000000\n1777\n700\nfifo\n"
    )
    assert child.run("print(os.getxattr('/root/f', 'user.note'))").stdout == "b'hi'\n"


@pytest.mark.both_engines
def test_open_files_have_offsets_of_their_own(parent, fork):
    """A file open for reading and one open for writing stand at the same place in each branch, and move apart."""
    parent.run(
        "w = open('/root/log', 'w'); w.write('start '); w.flush(); open('/root/in', 'w').write('abcdef'); r = open('/root/in', 'rb', buffering=0); r.read(2)"
    )
    one, two = fork(parent, 2)
    for machine, name in ((one, "one"), (two, "two"), (parent, "zero")):
        out = machine.run(f"w.write('{name}'); w.flush(); print(r.read(2), r.tell(), open('/root/log').read())")
        assert out.stdout == f"b'cd' 4 start {name}\n"


def test_append_mode_is_kept(parent, fork):
    """A file open for appending appends in each branch to that branch's file."""
    parent.run("a = open('/root/a', 'a'); a.write('1'); a.flush()")
    (child,) = fork(parent)
    child.run("a.write('child'); a.flush()")
    parent.run("a.write('parent'); a.flush()")
    assert child.run("print(open('/root/a').read())").stdout == "1child\n"
    assert parent.run("print(open('/root/a').read())").stdout == "1parent\n"


def test_deleted_but_open_files(parent, fork):
    """A file that is deleted but open has its content in each branch, and is written to separately."""
    parent.run(
        "import os, tempfile\nf = open('/root/gone', 'w+'); f.write('secret'); f.flush(); os.unlink('/root/gone'); t = tempfile.TemporaryFile(); t.write(b'temp'); t.flush()"
    )
    (child,) = fork(parent)
    assert (
        child.run(
            "f.seek(0); t.seek(0); print(f.read(), t.read()); f.write('+child'); f.flush(); f.seek(0); print(f.read())"
        ).stdout
        == "secret b'temp'\nsecret+child\n"
    )
    assert parent.run("f.seek(0); print(f.read())").stdout == "secret\n"


def test_a_replaced_file_keeps_its_old_content_for_who_has_it_open(parent, fork):
    """An open file whose path now names another file is the old one in the child, too."""
    parent.run(
        "import os\nf = open('/root/a', 'w+'); f.write('old'); f.flush(); open('/root/b', 'w').write('new'); os.rename('/root/b', '/root/a')"
    )
    (child,) = fork(parent)
    assert child.run("f.seek(0); print(f.read(), open('/root/a').read())").stdout == "old new\n"


def test_descriptors_of_one_file_stay_together(parent, fork):
    """What shares a position, a deleted file, or a file under another name, in the parent, shares it in each branch."""
    parent.run("""
import os, mmap
def made(name):
    with open(name, 'w') as file: file.write('abcdef')
    return os.open(name, os.O_RDWR)
first = made('/root/dup'); second = os.dup(first); apart = os.open('/root/dup', os.O_RDWR)
gone = made('/root/gone'); again = os.open('/root/gone', os.O_RDONLY); os.unlink('/root/gone'); os.fchmod(gone, 0o640)
linked = made('/root/old'); os.link('/root/old', '/root/new'); os.unlink('/root/old')
mapped = made('/root/mapped'); view = mmap.mmap(mapped, 6); os.unlink('/root/mapped')
memory = os.memfd_create('m'); os.write(memory, b'abcdef'); memory_view = mmap.mmap(memory, 6)
""")
    children = fork(parent, 2)
    for machine in (parent, *children):
        out = machine.run("""
os.read(first, 2); print(os.lseek(second, 0, 1), os.lseek(apart, 0, 1))
os.write(gone, b'XX'); print(os.pread(again, 6, 0), oct(os.fstat(again).st_mode))
try: os.write(again, b'YY')
except OSError as exc: print(exc.errno)
os.write(linked, b'XX'); print(open('/root/new').read())
os.write(mapped, b'XX'); print(view[:]); memory_view[:2] = b'XX'; print(os.pread(memory, 6, 0))
""")
        assert out.stdout == "2 0\nb'XXcdef' 0o100640\n9\nXXcdef\nb'XXcdef'\nb'XXcdef'\n", out


@pytest.mark.process_engine("virtual machines take all along")
def test_a_copy_that_lost_its_names_is_told(parent, fork):
    """An open file whose remaining name lies elsewhere is a copy in the child, which says so."""
    parent.run(
        "import os\nf = open('/root/a', 'w+'); f.write('x'); f.flush(); os.mkdir('/root/d'); os.link('/root/a', '/root/d/b'); os.unlink('/root/a')"
    )
    (child,) = fork(parent)
    out = child.run("f.seek(0); print(f.read())")
    assert out.stdout == "x\n" and "does not reach its other names" in out.stderr


def test_sqlite_connections_work_on(parent, fork):
    """An open database connection, with a transaction behind it, reads and writes in each branch by itself."""
    parent.run(
        "import sqlite3\ndb = sqlite3.connect('/root/x.db'); db.execute('create table t(x)'); db.execute('insert into t values (1)'); db.commit()"
    )
    (child,) = fork(parent)
    child.run("db.execute('insert into t values (2)'); db.commit()")
    parent.run("db.execute('insert into t values (3)'); db.commit()")
    assert child.run("print(db.execute('select x from t').fetchall())").stdout == "[(1,), (2,)]\n"
    assert parent.run("print(db.execute('select x from t').fetchall())").stdout == "[(1,), (3,)]\n"


def test_shared_mappings_are_not_shared_any_more(parent, fork):
    """Anonymous, file and named shared memory has the parent's content in the child, and then goes its own way."""
    parent.run("""
import mmap, multiprocessing.shared_memory as sm, os
anon = mmap.mmap(-1, 8192); anon[:2] = b'ab'
open('/root/m', 'wb').write(b'file' + bytes(4092)); fd = os.open('/root/m', os.O_RDWR); mapped = mmap.mmap(fd, 4096)
named = sm.SharedMemory('seg', create=True, size=4096); named.buf[:4] = b'name'
""")
    (child,) = fork(parent)
    assert (
        child.run(
            "print(anon[:2], mapped[:4], bytes(named.buf[:4])); anon[:2] = b'XX'; mapped[:4] = b'XXXX'; named.buf[:4] = b'XXXX'"
        ).stdout
        == "b'ab' b'file' b'name'\n"
    )
    assert (
        parent.run("print(anon[:2], mapped[:4], bytes(named.buf[:4]), open('/root/m', 'rb').read(4))").stdout
        == "b'ab' b'file' b'name' b'file'\n"
    )
    assert (
        child.run("mapped.flush(); print(open('/root/m', 'rb').read(4), os.listdir('/dev/shm'))").stdout
        == "b'XXXX' ['seg']\n"
    )
    parent.run("named.buf.release; named.unlink()")
    child.run("named.unlink()")


def test_temporary_directories_belong_to_each_branch(parent, fork):
    """Cleaning up a TemporaryDirectory in the child leaves the parent's."""
    parent.run("import tempfile, os; t = tempfile.TemporaryDirectory(); open(t.name + '/f', 'w').write('x')")
    (child,) = fork(parent)
    assert child.run("t.cleanup(); print(os.path.exists(t.name))").stdout == "False\n"
    assert parent.run("print(os.listdir(t.name))").stdout == "['f']\n"


@pytest.mark.process_engine("virtual machines take all along")
def test_sockets_and_pipes_are_dead_in_the_child_and_reported(parent, fork):
    """A connection stays with the parent, works on there, fails in the child, and is counted in the report."""
    parent.run("""
import os, socket, subprocess, threading
s = socket.create_server(('127.0.0.1', 8000)); c = socket.create_connection(('127.0.0.1', 8000)); p, _ = s.accept()
r, w = os.pipe(); proc = subprocess.Popen(['sleep', '1000'])
""")
    (child,) = fork(parent)
    report = child.machine.fork_report
    assert (report["sockets"], report["pipes"], report["processes"]) == (3, 2, 1)
    out = child.run(
        "try:\n    c.send(b'x'); c.send(b'y')\nexcept OSError as e: print(type(e).__name__)\nprint(os.read(r, 1))\nsocket.create_server(('127.0.0.1', 8000)).close(); print('listens')"
    )
    assert out.stdout == "BrokenPipeError\nb''\nlistens\n", out.stderr
    assert (
        parent.run(
            "c.send(b'x'); print(p.recv(1)); os.write(w, b'z'); print(os.read(r, 1)); proc.poll() is None"
        ).stdout
        == "b'x'\nb'z'\n"
    )


@pytest.mark.both_engines
def test_hostname_machine_id_and_shm_are_the_childs_own(parent, fork):
    """Identity is new in every child."""
    children = fork(parent, 3)
    look = "import socket; print(socket.gethostname(), open('/etc/machine-id').read().strip())"
    names = {machine.run(look).stdout for machine in (parent, *children)}
    assert len(names) == 4
    assert len({name.split()[1] for name in names}) == 4
