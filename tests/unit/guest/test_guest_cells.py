"""Promise: a Python cell behaves as in a notebook, and what it sets up is there in the next cell."""

from __future__ import annotations

import pytest

from podflare.wire.messages import ENDED


def test_ready_names_protocol_and_python(start_guest):
    """The first message of a guest is Ready with its protocol and interpreter version."""
    ready = start_guest().wait_ready()
    assert ready.protocol == 1
    assert ready.python.count(".") == 2


def test_variables_persist(guest):
    """What one cell assigns, the next one reads."""
    guest.run("x = 41")
    assert guest.run("print(x + 1)").out == "42\n"


def test_state_beyond_variables_persists(guest):
    """Imports, working directory, environment, sys.path, open files and sqlite connections outlive a cell."""
    first = guest.run("""
import json, os, sqlite3, sys
os.mkdir("sub"); os.chdir("sub")
os.environ["MARK"] = "set"
sys.path.append("/nowhere")
f = open("data", "w+"); f.write("kept")
db = sqlite3.connect(":memory:"); db.execute("create table t (n)"); db.execute("insert into t values (7)")
""")
    assert first.exit.code == 0, first.stderr
    second = guest.run("""
f.seek(0)
print(json.dumps(1), os.path.basename(os.getcwd()), os.environ["MARK"], sys.path[-1], f.read(),
      db.execute("select n from t").fetchone()[0])
""")
    assert second.out == "1 sub set /nowhere kept 7\n", second.stderr


def test_threads_and_children_outlive_their_cell(guest):
    """A thread and a child process that a cell leaves running are there in the next one."""
    guest.run("""
import subprocess, threading
go = threading.Event(); seen = []
thread = threading.Thread(target=lambda: (go.wait(), seen.append("thread")), daemon=True); thread.start()
child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
""")
    cell = guest.run("go.set(); thread.join(); print(seen, child.communicate(b'child')[0].decode(), child.returncode)")
    assert cell.out == "['thread'] child 0\n", cell.stderr


def test_signal_handlers_persist(guest):
    """A handler that one cell installs answers a signal in the next."""
    guest.run("import os, signal; got = []; signal.signal(signal.SIGUSR1, lambda *a: got.append('usr1'))")
    assert guest.run("os.kill(os.getpid(), signal.SIGUSR1); print(got)").out == "['usr1']\n"


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("1 + 1", "2"),
        ("x = 5\nx * 2", "10"),
        ("'text'", "'text'"),
        ("x = 1", None),
        ("None", None),
        ("1 + 1;", None),
        ("(1 +\n 1);  # done", None),
        ("'a;b'", "'a;b'"),
        ("5  # not; silent", "5"),
        ("'ä;ö'; 'ü'", "'ü'"),
        ("for i in range(3): i", None),
        ("", None),
        ("# only a comment", None),
        ("print('x') or 3", "3"),
        ("lambda: 0;", None),
    ],
)
def test_last_value(guest, code, value):
    """The value of a last expression is the result, unless it is None or a semicolon follows; it is never on stdout."""
    cell = guest.run(code)
    assert cell.value == value, cell.stderr
    assert cell.exit.code == 0
    assert "2" not in cell.out


def test_underscore_is_the_last_value(guest):
    """`_` holds the value shown last, and an assignment to `_` by the user wins."""
    guest.run("6 * 7")
    guest.run("y = 1")
    assert guest.run("print(_)").out == "42\n"
    guest.run("_ = 'mine'")
    guest.run("8")
    assert guest.run("print(_)").out == "mine\n"


@pytest.mark.parametrize(
    ("code", "out"),
    [
        ("    x = 1\n    print(x)\n", "1\n"),
        ("\n    if True:\n        print('in')\n    print('out')\n    ", "in\nout\n"),
        ("\tprint('tab')", "tab\n"),
        ('    s = """a\n  b\nc"""\n    print(s)', "a\n  b\nc\n"),
        ("    from __future__ import annotations\n    def f(x: undefined): pass\n    print('ok')", "ok\n"),
    ],
)
def test_uniformly_indented_code_runs(guest, code, out):
    """Code that is indented as a whole runs, and string literals in it keep their spaces."""
    cell = guest.run(code)
    assert (cell.out, cell.exit.code) == (out, 0), cell.stderr


@pytest.mark.parametrize("code", ["x = 1\n    y = 2", "    x = 1\n  y = 2", "    x = 1\ny = 2", "  if 1:\n  x"])
def test_wrong_indentation_is_still_an_error(guest, code):
    """Indentation that is not uniform stays the IndentationError that Python gives."""
    cell = guest.run(code)
    assert cell.exit.code == 1
    assert cell.error is not None
    assert cell.error.name == "IndentationError"


def test_future_imports_last(guest):
    """A `from __future__` import holds in later cells."""
    guest.run("from __future__ import annotations")
    guest.run("def f(x: not_defined): pass")
    assert guest.run("print(f.__annotations__)").out == "{'x': 'not_defined'}\n"


def test_main_is_the_users_namespace(guest):
    """`__main__` is a module whose attributes are the cells' globals, as in an interactive interpreter."""
    cell = guest.run("""
import sys
marker = object()
main = sys.modules["__main__"]
print(__name__, main.marker is marker, main.__dict__ is globals(), "__file__" in globals(), __builtins__.__name__)
""")
    assert cell.out == "__main__ True True False builtins\n"


def test_classes_of_cells_can_be_pickled(guest):
    """An object of a class that a cell defined survives pickle in a later cell."""
    guest.run("class Point:\n    def __init__(self, x): self.x = x")
    assert guest.run("import pickle; print(pickle.loads(pickle.dumps(Point(3))).x)").out == "3\n"


def test_multiprocessing_works(guest):
    """A pool of processes that were forked runs functions of earlier cells."""
    guest.run("def square(n): return n * n")
    cell = guest.run("""
import multiprocessing
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map(square, range(4)))
""")
    assert cell.out == "[0, 1, 4, 9]\n", cell.stderr


def test_source_of_functions_is_known(guest):
    """inspect.getsource gives the text of a function that an earlier cell defined."""
    guest.run("# first line\ndef f():\n    return 'body'\n")
    assert guest.run("import inspect; print(inspect.getsource(f))").out == "def f():\n    return 'body'\n\n"


def test_module_in_the_working_directory_can_be_imported(guest):
    """A .py file that a cell wrote into the working directory is importable, also after chdir."""
    guest.run("open('mine.py', 'w').write('value = 1')")
    assert guest.run("import mine; print(mine.value)").out == "1\n"
    guest.run("import os; os.mkdir('d'); os.chdir('d'); open('other.py', 'w').write('value = 2')")
    assert guest.run("import other; print(other.value)").out == "2\n"


def test_user_modules_may_have_our_names(guest):
    """Files named like modules of the guest or the standard library do not disturb the guest."""
    for name in ("frames", "agent", "repl", "wire", "podflare", "select", "json", "traceback", "linecache", "tokenize"):
        guest.run(f"open('{name}.py', 'w').write('raise SystemExit(9)')")
    assert guest.run("1 / 0").exit.code == 1
    assert guest.run("import os; os._exit(0)").exit.restarted
    again = guest.run("def f(): 1 / 0\nf()")
    assert "in f" in again.stderr
    assert "1 / 0" in again.stderr
    assert guest.bash("echo fine").out == "fine\n"


def test_user_packages_are_importable(start_guest, home):
    """Packages in the user's own site directory are on the path when the REPL starts."""
    import sys

    folder = home / f".local/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    folder.mkdir(parents=True)
    (folder / "installed.py").write_text("value = 'from user site'")
    guest = start_guest()
    guest.wait_ready()
    assert guest.run("import installed; print(installed.value)").out == "from user site\n"


def test_broken_site_configuration_does_not_end_the_machine(start_guest, home):
    """A .pth file that ends every Python at start costs the user packages, not the sandbox."""
    import sys

    folder = home / f".local/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    folder.mkdir(parents=True)
    (folder / "bad.pth").write_text("import os; os._exit(3)\n")
    guest = start_guest()
    guest.wait_ready()
    assert guest.run("print('alive')").out == "alive\n"


def test_exit_reason_of_an_ordinary_cell(guest):
    """A cell that runs to its end says so, with code 0."""
    cell = guest.run("pass")
    assert (cell.exit.code, cell.exit.reason, cell.exit.restarted, cell.exit.signal) == (0, ENDED, False, 0)


def test_input_gets_end_of_file(guest):
    """input() raises EOFError at once, and so does reading sys.stdin give nothing."""
    cell = guest.run("input('name? ')")
    assert cell.error is not None
    assert cell.error.name == "EOFError"
    assert guest.run("import sys; print(repr(sys.stdin.read()))").out == "''\n"


def test_child_that_reads_standard_input_does_not_hang(guest):
    """A subprocess that inherits standard input gets end of file."""
    assert guest.run("import subprocess; print(subprocess.run(['cat']).returncode)").out == "0\n"


def test_forked_child_that_reaches_the_end_of_the_cell(guest):
    """os.fork() in a cell gives one exit, the parent's, and the child does not run later cells."""
    cell = guest.run("""
import os
pid = os.fork()
if pid: print("child ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
else: print("in child")
""")
    assert sorted(cell.out.splitlines()) == ["child ended 0", "in child"]
    assert cell.order.count("exit") == 1
    assert guest.run("print('once')").out == "once\n"


def test_exception_in_a_forked_child(guest):
    """An exception in a forked child is a traceback and status 1 of the child, not an error of the cell."""
    cell = guest.run("""
import os
pid = os.fork()
if pid == 0: raise ValueError("in child")
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
""")
    assert cell.out == "1\n"
    assert "ValueError: in child" in cell.stderr
    assert cell.error is None
    assert cell.exit.code == 0


def test_bundle_is_not_importable(guest, bundle):
    """User code that imports podflare does not get the guest's own code."""
    cell = guest.run("""
import importlib.util, sys
print([name for name in sys.modules if name.split(".")[0] == "podflare"], sys.argv)
found = importlib.util.find_spec("podflare")
print(found.origin if found else None)
""")
    modules, origin = cell.out.splitlines()
    assert modules == "[] ['']"
    assert not origin.startswith(str(bundle))


def test_interactive_builtins_are_there(guest):
    """exit(), quit() and help are the builtins that a normal Python has, and exit() ends only the cell."""
    assert guest.run("exit(4)").exit.code == 4
    assert guest.run("quit()").exit.code == 0
    assert guest.run("print(callable(help), input.__name__)").out == "True input\n"


def test_null_bytes_and_surrogates_in_code(guest):
    """Code that Python cannot read at all is an error of that cell only."""
    assert guest.run("print('a')\0").exit.code == 1
    assert guest.run("x = '\ud800'").exit.code == 1
    assert guest.run("print('next')").out == "next\n"


def test_very_long_code(guest):
    """A cell of 8 MiB runs."""
    code = "x = '" + "a" * (8 * 1024 * 1024 - 100) + "'\nprint(len(x))"
    assert guest.run(code).out == f"{8 * 1024 * 1024 - 100}\n"


def test_second_cell_at_a_time_breaks_the_protocol(guest):
    """A host that sends a cell while another runs ends the machine."""
    guest.start("import time; time.sleep(60)")
    guest.start("2")
    assert guest.process.wait(10) == 1
