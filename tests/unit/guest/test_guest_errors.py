"""Promise: an exception is told with the user's lines, and the REPL outlives every kind of it."""

from __future__ import annotations

import pytest

from podflare.wire.messages import ENDED, MAX_TEXT_CHARS, MAX_TRACEBACK_CHARS


def test_traceback_shows_user_lines_only(guest):
    """A traceback names cells and their source lines, and no file of the guest."""
    guest.run("def outer():\n    return inner()\ndef inner():\n    return 1 / 0")
    cell = guest.run("outer()")
    lines = cell.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert [line for line in lines if line.startswith("  File")] == [
        '  File "<cell 2>", line 1, in <module>',
        '  File "<cell 1>", line 2, in outer',
        '  File "<cell 1>", line 4, in inner',
    ]
    assert "    return 1 / 0" in lines
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert (cell.exit.code, cell.exit.reason) == (1, ENDED)


def test_error_message_carries_the_same(guest):
    """The error event has class, message and the traceback that stderr shows."""
    cell = guest.run("print('before'); {}['key']")
    assert cell.error is not None
    assert (cell.error.name, cell.error.value) == ("KeyError", "'key'")
    assert cell.error.traceback == cell.stderr
    assert cell.out == "before\n"


def test_library_frames_stay(guest):
    """Frames of libraries between the user's line and the exception are shown."""
    cell = guest.run("import json\njson.loads('nonsense')")
    assert "json/decoder.py" in cell.stderr
    assert '  File "<cell 1>", line 2, in <module>' in cell.stderr


def test_chained_exceptions(guest):
    """Cause and context of an exception are shown with their own lines."""
    cell = guest.run("""
try:
    try: 1 / 0
    except ZeroDivisionError as e: raise KeyError("second") from e
except KeyError:
    raise ValueError("third")
""")
    for text in ("ZeroDivisionError", "direct cause", "KeyError: 'second'", "During handling", "ValueError: third"):
        assert text in cell.stderr


@pytest.mark.parametrize(
    ("code", "line", "text"),
    [("x = 1\nfor in x:", 2, "for in x:"), ("    a = 1\n    b = = 2", 2, "b = = 2"), ("print('a'\n", 1, "print('a'")],
)
def test_syntax_errors_point_at_the_line(guest, code, line, text):
    """A syntax error names the cell's line, shows it, marks the place, and has no frames."""
    cell = guest.run(code)
    assert cell.stderr.startswith(f'  File "<cell 1>", line {line}\n')
    assert text in cell.stderr
    assert "^" in cell.stderr
    assert "Traceback" not in cell.stderr
    assert cell.error is not None
    assert cell.error.name == "SyntaxError"


def test_error_of_the_compiler_after_parsing(guest):
    """A mistake that only the compiler finds is a SyntaxError with its line, too."""
    cell = guest.run("x = 1\nreturn x")
    assert 'File "<cell 1>", line 2' in cell.stderr
    assert "SyntaxError: 'return' outside function" in cell.stderr


@pytest.mark.parametrize(
    ("code", "exit_code", "err"),
    [
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(None)", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("import sys; sys.exit(256 + 4)", 4, ""),
        ("import sys; sys.exit(-1)", 255, ""),
        ("import sys; sys.exit(10**30)", 255, ""),
        ("import sys; sys.exit(True)", 1, ""),
        ("import sys; sys.exit('message')", 1, "message\n"),
        ("import sys; sys.exit([1, 2])", 1, "[1, 2]\n"),
    ],
)
def test_system_exit(guest, code, exit_code, err):
    """SystemExit ends the cell with the exit code of CPython's rule, and the REPL lives."""
    guest.run("kept = 1")
    cell = guest.run(code)
    assert (cell.exit.code, cell.stderr, cell.error, cell.exit.restarted) == (exit_code, err, None, False)
    assert guest.run("kept").value == "1"


@pytest.mark.parametrize(
    "code",
    [
        "def f(): f()\nf()",
        "raise MemoryError",
        "raise BaseException('base')",
        "raise GeneratorExit",
        "class E(Exception):\n    def __str__(self): raise ValueError\nraise E",
        "class E(Exception):\n    def __str__(self): raise SystemExit\nraise E",
        "class E(Exception):\n    def __repr__(self): return 5\n    __str__ = __repr__\nraise E",
        "class M(type):\n    __name__ = property(lambda s: 1 / 0)\nclass E(Exception, metaclass=M): pass\nraise E",
        "class E(Exception):\n    def __getattribute__(self, name): raise RuntimeError\nraise E",
        "import sys\nclass Bad:\n    def __str__(self): 1 / 0\nsys.exit(Bad())",
        "e = None\nfor i in range(5000):\n    n = ValueError(i); n.__cause__ = e; e = n\nraise e",
        "a = ValueError(); b = KeyError(); a.__cause__ = b; b.__cause__ = a; raise a",
        "eval('(' * 300)",
        "import sys; sys.excepthook = None; sys.stderr = None; 1 / 0",
        "import traceback; traceback.TracebackException = None; 1 / 0",
        "import linecache; linecache.getline = linecache.getlines = None; 1 / 0",
        "exec('raise ValueError', {'__name__': 5})",
        "raise Exception('\\ud800')",
        "import sys\nclass S:\n    def flush(self): raise SystemExit(9)\nsys.stdout = S()\n1 / 0",
    ],
)
def test_hostile_exceptions_end_the_cell_only(guest, code):
    """Whatever an exception is or does while it is told, the cell ends with a code that is not 0 and the REPL lives."""
    guest.run("kept = 1")
    cell = guest.run(code)
    assert cell.exit.code == 1, cell
    assert not cell.exit.restarted, cell.stderr
    assert guest.run("kept").value == "1"


def test_a_very_deep_recursion_is_told_soon(guest):
    """A raised recursion limit costs the frames in the middle, not seconds; first and last lines are shown."""
    guest.run("import sys; sys.setrecursionlimit(200_000)\ndef f(n): return f(n - 1) if n else 1 / 0")
    cell = guest.run("f(100_000)")
    lines = cell.stderr.splitlines()
    assert lines[0].endswith("frames in the middle are left out]") and 97_000 < int(lines[0][1:].split()[0]) < 100_002
    assert lines[1:3] == ["Traceback (most recent call last):", '  File "<cell 2>", line 1, in <module>']
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert guest.run("print(1)").out == "1\n"


def test_recursion_is_told_briefly(guest):
    """An endless recursion shows its repeated frames once, not a thousand times."""
    cell = guest.run("def f():\n    f()\nf()")
    assert "RecursionError" in cell.stderr
    assert len(cell.stderr) < 2000


def test_huge_message_is_cut(guest):
    """An exception whose text is 50 MB is told within the caps, with the number of characters left out."""
    cell = guest.run("raise ValueError('x' * 50_000_000)")
    assert cell.error is not None
    assert len(cell.error.value) <= MAX_TEXT_CHARS
    assert len(cell.error.traceback) <= MAX_TRACEBACK_CHARS
    assert "characters left out" in cell.error.traceback


def test_keyboard_interrupt_of_the_users_own(guest):
    """A KeyboardInterrupt that code raises itself ends the cell as an interrupt does, with 130."""
    cell = guest.run("raise KeyboardInterrupt")
    assert (cell.exit.code, cell.exit.reason) == (130, "interrupted")


def test_last_exception_is_kept_for_debugging(guest):
    """sys.last_value holds the exception, as pdb.pm() expects."""
    guest.run("1 / 0")
    assert guest.run("import sys; print(sys.last_type.__name__, sys.last_value, sys.last_traceback.tb_lineno)").out == (
        "ZeroDivisionError division by zero 1\n"
    )


def test_warnings_name_the_cell(guest):
    """A warning on stderr names cell and line."""
    cell = guest.run("import warnings\nwarnings.warn('careful')")
    assert cell.stderr.startswith("<cell 1>:2: UserWarning: careful")
    assert cell.exit.code == 0
